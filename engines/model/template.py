"""What a chat template tells before an engine reads it: its syntax, what it uses, and whether it refuses a chat."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType, MappingProxyType
from typing import Any, NoReturn

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

LINES = 100_000  # of a rendering that is tried: a template may loop without end
# the conversation that llama-server renders at its start
SYSTEM = {"role": "system", "content": "You are a helpful assistant"}
CHAT = tuple(
    {"role": role, "content": text}
    for role, text in (("user", "Hello"), ("assistant", "Hi there"), ("user", "How are you?"))
)

_OPENING = re.compile(r"\{[{%#]")
_CLOSING = MappingProxyType({"{": "}}", "%": "%}", "#": "#}"})
_QUOTED = re.compile(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"")


def template_shows_tools(template: str | None) -> bool | None:
    """Whether the template's code (not its prose, comments or quoted text) names `tools`; None without a template.

    A template that never does cannot show the request's tools to the model, and engines then drop them silently.
    """
    if not template:
        return None
    return any(re.search(r"\btools\b", _QUOTED.sub("''", code)) for code in _jinja_code(template))


def template_error(template: str | None) -> str | None:
    """Why Jinja cannot compile the template; a tag that only Hugging Face's trainer knows counts as known."""
    try:
        Environment(extensions=[loopcontrols]).compile(template or "", raw=True)
    except TemplateSyntaxError as error:
        return None if "generation" in str(error) else f"line {error.lineno}: {error.message}"
    return None


def template_beyond(template: str | None, known: Mapping[str, Sequence[str]]) -> str | None:
    """The first statement, filter, test or function of the template that a template engine does not have.

    `known`: `statements_lacking` by the names of Jinja's nodes, `filters`, `tests`, `functions` and `methods`.
    """
    if not template or template_error(template):
        return None
    try:
        tree = Environment(extensions=[loopcontrols]).parse(template)
    except TemplateSyntaxError:
        return None  # of a tag that counts as parsed
    functions = {*known["functions"], *(macro.name for macro in tree.find_all(nodes.Macro)), "caller"}
    for node in tree.find_all(nodes.Node):
        kind = type(node).__name__
        if kind in known["statements_lacking"]:
            return f"a {kind} statement"
        if isinstance(node, nodes.Filter) and node.name not in known["filters"]:
            return f"the filter {node.name}"
        if isinstance(node, nodes.Test) and node.name not in known["tests"]:
            return f"the test {node.name}"
        if isinstance(node, nodes.Call):
            called = node.node
            if isinstance(called, nodes.Name) and called.name not in functions:
                return f"the function {called.name}"
            if isinstance(called, nodes.Getattr) and called.attr not in known["methods"]:
                return f"the method {called.attr}"
    return None


class _Refused(Exception):
    """The template called `raise_exception`."""


class _TooLong(Exception):
    """The rendering is not worth its time."""


class _Trial(ImmutableSandboxedEnvironment):
    """Without the operators and filters that can fill the memory from a few characters."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Numbers only: `"a" * 10**9` is none."""
        if operator == "**" or not all(isinstance(side, int | float) for side in (left, right)):
            raise _TooLong
        return super().call_binop(context, operator, left, right)


def template_refuses(template: str | None) -> str | None:
    """What the template says where it raises an exception of its own for any plain chat; None where it renders one.

    Also None where that cannot be tried.
    """
    if not template or "raise_exception" not in template:
        return None
    said = [
        _rendered(template, [message | {"content": form(message["content"])} for message in chat])
        for chat in ((SYSTEM, *CHAT), CHAT, CHAT[:1])
        for form in (str, lambda text: [{"type": "text", "text": text}])
    ]
    return said[0] if all(why is not None for why in said) else None


def _rendered(template: str, messages: list[dict[str, Any]]) -> str | None:
    """What the template raised by itself; None where it did not."""

    def refuse(why: object = "") -> NoReturn:
        raise _Refused(str(why) or "no reason given")

    environment = _Trial(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    for name in ("center", "format", "indent"):
        del environment.filters[name]
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda _: "2026-11-29"}
    left, before = LINES, sys.gettrace()

    def count(_frame: FrameType, _event: str, _: object) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise _TooLong
        return count

    try:
        compiled = environment.from_string(template)
        sys.settrace(count)
        compiled.render(messages=messages, add_generation_prompt=True, bos_token="", eos_token="")
    except _Refused as error:
        return str(error)
    except Exception:  # whatever else a template does wrong here, the engine's own Jinja may do otherwise
        return None
    finally:
        sys.settrace(before)
    return None


def _jinja_code(template: str) -> Iterator[str]:
    """The inside of every `{{ }}` and `{% %}`, in order; `{# #}` is skipped, and so is what is never closed."""
    at = 0
    while opened := _OPENING.search(template, at):
        mark = template[opened.start() + 1]
        closed = template.find(_CLOSING[mark], opened.end())
        if closed < 0:
            return
        if mark != "#":
            yield template[opened.end() : closed]
        at = closed + 2
