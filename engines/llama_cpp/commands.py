"""llama-server commands as people have them: typed in a shell, in a unit, in front of a container, or running.

Read, never executed.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from engines.errors import BadInput
from engines.llama_cpp.argv import EVERY_HOST, LlamaServerCommand, Published, read_flags


def read_argv(
    argv: Sequence[str], *, environ: Mapping[str, str] | None = None, cwd: Path | None = None
) -> LlamaServerCommand:
    """The command `argv` in words of a plan; `environ` is the environment it runs in.

    `cwd` is where the command was run, for a relative model path. Raises BadInput, one line, for another program, a
    value of the wrong kind or one that is missing. An API key is noticed and never copied.
    """
    binary, flags = _program_and_flags(list(argv))
    published = _published(argv[: len(argv) - len(flags)])
    return read_flags(flags, binary=binary, environ=environ, cwd=cwd, published=published)


def parse_command(text: str, *, cwd: Path | None = None) -> LlamaServerCommand:
    """The settings of a command typed in a shell; variables in front count, what follows a pipe or `>` does not."""
    try:
        words = shlex.split(_UNIT_LINE.sub("", text).replace("\\\r\n", " ").replace("\\\n", " "))
    except ValueError as error:
        raise BadInput(f"the command cannot be read: {str(error).lower()}; check its quotes") from None
    if not words:
        raise BadInput("the command is empty; give the whole line that starts llama-server")
    start = next((i for i, word in enumerate(words) if _is_llama_server(word)), 0)
    ends = (i for i, word in enumerate(words) if i > start and _SHELL_END.fullmatch(word))
    words = words[: next(ends, len(words))]
    environ = dict(word.split("=", 1) for word in words[:start] if _ASSIGNMENT.match(word))
    return read_argv(words, environ=environ, cwd=cwd)


def read_listener(port: int, *, connections: Callable[..., Any] = psutil.net_connections) -> LlamaServerCommand:
    """The settings of the llama-server that listens on `port`, from its flags and its environment.

    Raises BadInput, one line: nobody listens there, this user may not see who does, or it is another program.
    """
    not_allowed = (
        f"port {port}: this user may not see who listens there; run as that user or as root, or give the command"
    )
    try:
        found = [c for c in connections(kind="tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port]
        if not found:
            raise BadInput(f"port {port}: nobody listens there; start llama-server first, or give its command")
        pid = next((connection.pid for connection in found if connection.pid), None)
        if pid is None:
            raise BadInput(not_allowed)
        process = psutil.Process(pid)
        argv = process.cmdline()
    except psutil.AccessDenied:
        raise BadInput(not_allowed) from None
    except psutil.NoSuchProcess as error:
        raise BadInput(f"port {port}: pid {error.pid} ended while it was read; try again") from None
    try:
        _program_and_flags(argv)
    except BadInput:
        name = _basename(argv[0]) if argv else "an unnamed process"
        who = f"{name} (pid {process.pid}) listens there, not llama-server"
        raise BadInput(f"port {port}: {who}; give llama-server's port or its command") from None
    environ, cwd = _allowed(process.environ, {}), _allowed(lambda: Path(process.cwd()), None)
    # it is known where it listens, also where its environment may not be read
    command = read_argv([*argv, "--port", str(port)], environ=environ, cwd=cwd)
    command.port = port
    return command


# ---- the program

_PROGRAM = re.compile(r"^(llama-server.*(?<!\.gguf)|llama\.cpp:server.*|server(\.exe)?)$")
_UNIFIED = re.compile(r"^llama(\.exe)?$")
_ASSIGNMENT = re.compile(r"^[A-Za-z_]\w*=")
_UNIT_LINE = re.compile(r"^\s*ExecStart=[-@:+!|]*")  # of a systemd unit
_PUBLISHED = re.compile(r"(?:(?:(?P<ip>[\d.]+|\[[^\]]+\]):)?(?P<outside>\d+):)?(?P<inside>\d+)(?:/tcp)?")
_SHELL_END = re.compile(r"\||\|\||&|&&|;|[012&]?>>?.*")


def _basename(word: str) -> str:
    return re.split(r"[/\\]", word)[-1]


def _is_llama_server(word: str) -> bool:
    return not word.startswith("-") and not _ASSIGNMENT.match(word) and bool(_PROGRAM.match(_basename(word)))


def _program_and_flags(argv: list[str]) -> tuple[str | None, list[str]]:
    """The llama-server in `argv` (None when only flags are given, or it runs in a container) and what follows it."""
    if argv and argv[0].startswith("-"):
        return None, argv
    for index, word in enumerate(argv):
        if _is_llama_server(word):
            return (None if ":" in _basename(word) else word), argv[index + 1 :]
        if _UNIFIED.match(_basename(word)) and argv[index + 1 : index + 2] == ["serve"]:
            return word, argv[index + 2 :]
    shown = " ".join(argv[:2]) or "nothing"
    raise BadInput(f"no llama-server in the command: it runs '{shown}'; give the line that starts llama-server")


def _published(words: Sequence[str]) -> Published | None:
    """Where a container's port is reached from outside, by `-p [[IP:]HOST:]CONTAINER` in `words`; None without one."""
    pairs = itertools.pairwise(words)
    given = [after for word, after in pairs if word in ("-p", "--publish")]
    given += [word.partition("=")[2] for word in words if word.startswith("--publish=")]
    found = [match for text in reversed(given) if (match := _PUBLISHED.fullmatch(text))]  # of two the first counts
    ports = {int(m["inside"]): (m["ip"] or EVERY_HOST, int(m["outside"])) for m in found if m["outside"]}
    return ports if found else None


def _allowed(read: Callable[[], Any], otherwise: Any) -> Any:
    try:
        return read()
    except (psutil.Error, OSError):
        return otherwise
