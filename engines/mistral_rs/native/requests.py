"""Request bodies of OpenAI's API, checked: platform.openai.com/docs/api-reference (chat, completions).

Nothing here knows an engine. `exceed_context_size_error` is as llama.cpp has it, so that one client reads both.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass, field, replace
from typing import Any

Json = dict[str, Any]

GRAMMARS = ("regex", "lark", "json_schema")
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MAX_CHOICES = 128


class ApiError(Exception):
    """A request that is answered with an error: HTTP *status* and OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        code: str | int | None = None,
        param: str | None = None,
        **extra: Any,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.error: Json = {"message": message, "type": type, "param": param, "code": code, **extra}

    @property
    def body(self) -> Json:
        return {"error": self.error}


def bad(param: str, message: str) -> ApiError:
    """A 400 that names the parameter."""
    return ApiError(400, f"'{param}': {message}", param=param)


def context_exceeded(prompt_tokens: int, context: int) -> ApiError:
    return ApiError(
        400,
        f"the request exceeds the available context size: {prompt_tokens} prompt tokens, {context} of context",
        type="exceed_context_size_error",
        code="context_length_exceeded",
        n_prompt_tokens=prompt_tokens,
        n_ctx=context,
    )


@dataclass(frozen=True)
class Grammar:
    """What a generated text must obey: its *kind* is one of GRAMMARS, and *param* is the parameter that asks for it."""

    kind: str
    text: str
    param: str = "grammar"


@dataclass(frozen=True, kw_only=True)
class SamplingParameters:
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    grammar: Grammar | None = None


@dataclass(frozen=True, kw_only=True)
class ChatCall:
    """A checked body of POST /v1/chat/completions; `forced_tools` names the tools of which one must be called."""

    messages: list[Json]
    sampling: SamplingParameters
    tools: list[Json] = field(default_factory=list)
    forced_tools: tuple[str, ...] = ()
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    template_arguments: Json = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CompletionCall:
    """A checked body of POST /v1/completions; a prompt is text or token ids."""

    prompts: list[str | list[int]]
    sampling: SamplingParameters
    n: int = 1
    echo: bool = False
    stream: bool = False
    include_usage: bool = False


def _number(body: Json, name: str, low: float, high: float = math.inf) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise bad(name, f"must be a number, not {value!r}")
    if not low <= value <= high:
        limits = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise bad(name, f"must be {limits}, not {value!r}")
    return float(value)


def _integer(body: Json, name: str, low: int, high: float = math.inf) -> int | None:
    value = body.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise bad(name, f"must be an integer, not {value!r}")
    _number(body, name, low, high)
    return value


def _flag(body: Json, name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise bad(name, f"must be true or false, not {value!r}")
    return bool(value)


def _object(body: Json, name: str) -> Json:
    value = body.get(name)
    if value is not None and not isinstance(value, dict):
        raise bad(name, f"must be an object, not {value!r}")
    return value or {}


def _stop(body: Json) -> tuple[str, ...]:
    value = body.get("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(one, str) for one in stops):
        raise bad("stop", "must be a string or a list of strings")
    return tuple(one for one in stops if one)


def parse_sampling(body: Json, *, grammar: Grammar | None, logprobs: tuple[bool, int]) -> SamplingParameters:
    """The sampling part of a body. Temperature is OpenAI's default of 1 where it is missing; 0 is greedy."""
    limit = _integer(body, "max_completion_tokens", 1)
    if limit is None:
        limit = _integer(body, "max_tokens", 1)
    temperature = _number(body, "temperature", 0)
    try:
        bias = {int(token): float(number) for token, number in _object(body, "logit_bias").items()}
    except (TypeError, ValueError):
        raise bad("logit_bias", "must map token ids to numbers") from None
    if not all(math.isfinite(number) for number in bias.values()):
        raise bad("logit_bias", "must map token ids to finite numbers")
    _integer(body, "seed", -(2**63))
    return SamplingParameters(
        temperature=1.0 if temperature is None else temperature,
        top_p=_number(body, "top_p", 0, 1),
        top_k=_integer(body, "top_k", 0) or None,
        min_p=_number(body, "min_p", 0, 1),
        presence_penalty=_number(body, "presence_penalty", -2, 2),
        frequency_penalty=_number(body, "frequency_penalty", -2, 2),
        repetition_penalty=_number(body, "repetition_penalty", 0) or _number(body, "repeat_penalty", 0),
        logit_bias=bias or None,
        stop=_stop(body),
        max_tokens=limit,
        ignore_eos=_flag(body, "ignore_eos"),
        logprobs=logprobs[0],
        top_logprobs=logprobs[1],
        grammar=grammar,
    )


def check_model(body: Json, model_id: str) -> None:
    """404 unless the body asks for *model_id*, "default", or no model by name."""
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise bad("model", "must be a string")
    if model not in (None, "", "default", model_id):
        message = f"The model '{model}' does not exist; this server serves '{model_id}'"
        raise ApiError(404, message, code="model_not_found", param="model")


def _text(content: Any, where: str) -> str:
    """Message content as one string: text parts are joined by a newline, as llama.cpp does."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad(where, "must be a string or a list of text parts")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise bad(where, f"only text parts are supported, not {kind!r}")
    return "\n".join(part["text"] for part in content)


def _past_calls(calls: Any, where: str) -> list[Json]:
    """Tool calls of an earlier turn, arguments as a mapping where they are one: what chat templates expect."""
    if not isinstance(calls, list):
        raise bad(where, "must be a list")
    read = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise bad(where, "each call needs function.name")
        arguments = function.get("arguments", "")
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError, RecursionError):
                parsed = json.loads(arguments or "{}")
                arguments = parsed if isinstance(parsed, dict) else arguments
        read.append({**call, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return read


def parse_messages(body: Json) -> list[Json]:
    """The messages, each with a role and content as one string; 400 where one is missing or unknown."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise bad("messages", "must be a list of at least one message")
    return [_message(message, f"messages[{at}]") for at, message in enumerate(messages)]


def _message(message: Any, where: str) -> Json:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise bad(f"{where}.role", f"must be one of {', '.join(ROLES)}, not {role!r}")
    if message.get("content") is None and not message.get("tool_calls") and role != "assistant":
        raise bad(f"{where}.content", "is missing")
    plain: Json = {
        "role": "system" if role == "developer" else role,
        "content": _text(message.get("content"), f"{where}.content"),
    }
    if message.get("tool_calls"):
        plain["tool_calls"] = _past_calls(message["tool_calls"], f"{where}.tool_calls")
    return plain | {name: message[name] for name in ("tool_call_id", "name", "reasoning_content") if message.get(name)}


def parse_tools(body: Json) -> list[Json]:
    tools = body.get("tools") or []
    if not isinstance(tools, list):
        raise bad("tools", "must be a list")
    for at, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type", "function") != "function":
            raise bad(f"tools[{at}]", 'must be {"type": "function", "function": {...}}')
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise bad(f"tools[{at}].function.name", "must be a name")
        if not isinstance(function.get("parameters", {}), dict):
            raise bad(f"tools[{at}].function.parameters", "must be a JSON schema")
    return tools


def forced_tools(body: Json, tools: list[Json]) -> tuple[str, ...]:
    """Names of the tools of which one must be called: none for "auto" and "none", all for "required", one if named."""
    choice = body.get("tool_choice")
    names = tuple(tool["function"]["name"] for tool in tools)
    if choice in (None, "auto", "none"):
        return ()
    if choice == "required":
        if not names:
            raise bad("tool_choice", "is 'required' but there are no tools")
        return names
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if name is None:
        raise bad("tool_choice", f"must be auto, none, required or a named function, not {choice!r}")
    if name not in names:
        raise bad("tool_choice", f"names the function {name!r}, which is not among the tools")
    return (name,)


def forced_schema(tools: list[Json], names: tuple[str, ...]) -> Json:
    """The JSON schema of one call `{"name": ..., "arguments": {...}}` to one of the named tools."""
    calls = []
    for function in (tool["function"] for tool in tools if tool["function"]["name"] in names):
        parameters = function.get("parameters") or {"type": "object"}
        properties = {"name": {"const": function["name"]}, "arguments": {"type": "object"} | parameters}
        required = ["name", "arguments"]
        calls.append({"type": "object", "properties": properties, "required": required, "additionalProperties": False})
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def response_schema(body: Json) -> Grammar | None:
    """The JSON schema that `response_format` (or llama.cpp's `json_schema`) asks for; None for plain text."""
    wanted = _object(body, "response_format")
    kind = wanted.get("type", "text" if not wanted else None)
    if kind == "text":
        own = body.get("json_schema")
        return Grammar("json_schema", json.dumps(own), "json_schema") if isinstance(own, dict) else None
    if kind == "json_object":
        return Grammar("json_schema", json.dumps(wanted.get("schema") or {"type": "object"}), "response_format")
    if kind != "json_schema":
        raise bad("response_format.type", f"must be text, json_object or json_schema, not {kind!r}")
    described = wanted.get("json_schema")
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        raise bad("response_format.json_schema.schema", "must be a JSON schema")
    return Grammar("json_schema", json.dumps(schema), "response_format")


def parse_grammar(body: Json) -> Grammar | None:
    """What the text must obey: `grammar`, or a JSON schema asked for in another way; None for plain text.

    `{"type": ..., "value": ...}` as mistral.rs's own server has it (`mistralrs-server-core/src/openai.rs`). A string,
    llama.cpp's GBNF, is not looked at.
    """
    wanted, schema = body.get("grammar"), response_schema(body)
    if wanted is None or isinstance(wanted, str):
        return schema
    if schema:
        raise bad("grammar", f"cannot be combined with {schema.param}")
    if not isinstance(wanted, dict):
        raise bad("grammar", f'must be an object with "type" and "value", not {wanted!r}')
    kind, value = wanted.get("type"), wanted.get("value")
    if kind not in GRAMMARS:
        raise bad("grammar.type", f"must be regex, lark or json_schema, not {kind!r}")
    if kind == "json_schema":
        if not isinstance(value, dict):
            raise bad("grammar.value", f"must be a JSON schema, not {value!r}")
        return Grammar(kind, json.dumps(value))
    if not isinstance(value, str) or not value:
        raise bad("grammar.value", f"must be the text of the grammar, not {value!r}")
    return Grammar(kind, value)


def _include_usage(body: Json, stream: bool) -> bool:
    if body.get("stream_options") is not None and not stream:
        raise bad("stream_options", "is only allowed when stream is true")
    return _flag(_object(body, "stream_options"), "include_usage")


def parse_chat(body: Json) -> ChatCall:
    """A checked chat call; ApiError 400 that names the parameter otherwise."""
    tools = parse_tools(body)
    forced = forced_tools(body, tools)
    grammar = parse_grammar(body)
    if forced:
        if grammar and grammar.param == "grammar":
            raise bad("grammar", "cannot be combined with a tool_choice that forces a call")
        grammar = Grammar("json_schema", json.dumps(forced_schema(tools, forced)), "tools")
    wants_logprobs, top = _flag(body, "logprobs"), _integer(body, "top_logprobs", 0) or 0
    if top and not wants_logprobs:
        raise bad("top_logprobs", "needs logprobs: true")
    sampling = parse_sampling(body, grammar=grammar, logprobs=(wants_logprobs, top))
    stream = _flag(body, "stream")
    return ChatCall(
        messages=parse_messages(body),
        sampling=replace(sampling, stop=()) if forced else sampling,  # a forced call has no text that could stop
        tools=[] if body.get("tool_choice") == "none" else tools,
        forced_tools=forced,
        n=_integer(body, "n", 1, MAX_CHOICES) or 1,
        stream=stream,
        include_usage=_include_usage(body, stream),
        template_arguments=_object(body, "chat_template_kwargs"),
    )


def _prompts(body: Json) -> list[str | list[int]]:
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(type(one) is int for one in prompt):
            return [prompt]
        lists = [one for one in prompt if not isinstance(one, str)]
        if all(isinstance(one, list) and one and all(type(token) is int for token in one) for one in lists):
            return prompt
    raise bad("prompt", "must be a string, a list of strings, or token ids")


def parse_completion(body: Json) -> CompletionCall:
    """A checked text completion call; `logprobs` is the legacy number of alternatives."""
    if body.get("suffix"):
        raise bad("suffix", "is not supported by this engine")
    wanted = body.get("logprobs")
    top = (0 if wanted else None) if isinstance(wanted, bool) else _integer(body, "logprobs", 0)
    stream = _flag(body, "stream")
    return CompletionCall(
        prompts=_prompts(body),
        sampling=parse_sampling(body, grammar=parse_grammar(body), logprobs=(top is not None, top or 0)),
        n=_integer(body, "n", 1, MAX_CHOICES) or 1,
        echo=_flag(body, "echo"),
        stream=stream,
        include_usage=_include_usage(body, stream),
    )
