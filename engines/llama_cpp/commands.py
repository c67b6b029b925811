"""llama-server commands as people have them: typed, in a script, unit, compose file or llama-swap config, or running.

Read, never executed.
"""

from __future__ import annotations

import os
import plistlib
import re
import shlex
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import psutil

from engines.errors import BadInput
from engines.llama_cpp import containers, manifests
from engines.llama_cpp.argv import DEFAULT_HOST, LlamaServerCommand, is_program, read_flags
from engines.llama_cpp.containers import Container
from engines.llama_cpp.flags import OWN_ARGS
from engines.llama_cpp.shell import Command, Shell, read_shell
from engines.llama_cpp.units import is_unit, read_unit
from engines.llama_cpp.windows import DRIVE, as_shell
from engines.own_args import LIBRARIES, NEXT_FLAG
from engines.redaction import redacted_text

UNIFIED = re.compile(r"^llama(\.exe)?$")
ASSIGNMENT = re.compile(r"^[A-Za-z_]\w*=")
# in front of a program, and without a trace once it runs
PLAIN = {"env", "exec", "nohup", "sudo", "doas", "setsid", "-E", "-i", "--"}
READ_TOO = ("LLAMA_", "HF_", "XDG_", "HOME", "HUGGINGFACE_", "PATH", "PWD")  # of use, without being the engine's own
SWAP_PORT = 8080  # llama-swap's own


def read_argv(
    argv: Sequence[str], *, environ: Mapping[str, str] | None = None, cwd: Path | None = None
) -> LlamaServerCommand:
    """The command `argv` in words of a plan; `environ` is the environment it runs in.

    `cwd` is where the command was run, for relative paths. Raises BadInput, one line, for another program, a value of
    the wrong kind or one that is missing. An API key is noticed and never copied.
    """
    binary, flags = _program_and_flags(list(argv))
    return read_flags(flags, binary=binary, environ=environ, cwd=cwd)


def parse_command(text: str, *, cwd: Path | None = None) -> LlamaServerCommand:
    """The first llama-server that `text` starts: a command, a script, a unit, a compose file or a llama-swap config."""
    return parse_commands(text, cwd=cwd)[0]


def parse_commands(text: str, *, cwd: Path | None = None) -> list[LlamaServerCommand]:
    """Every model that `text` serves; a script counts with its first llama-server, the others are named.

    Raises BadInput, one line: no llama-server, an open quote, a Windows path.
    """
    if not text.strip():
        raise BadInput("the command is empty; give the whole line that starts llama-server")
    if "\0" in text:  # /proc/PID/cmdline
        return [read_argv(text.rstrip("\0\n").split("\0"), cwd=cwd)]
    if "<plist" in text:
        return [_launchd(text, cwd)]
    if is_unit(text):
        unit = read_unit(text, cwd)
        return [_script(unit.text, unit.env, unit.cwd, unit.used, unit.notes)]
    configs = manifests.documents(text)
    for config in configs:
        if isinstance(config, dict) and isinstance(config.get("services"), dict):
            services = ", ".join(map(str, config["services"]))
            return [_first(manifests.of_compose(config["services"], cwd), f"the services ({services})", cwd)]
        if isinstance(config, dict) and isinstance(config.get("models"), dict):
            return _llama_swap(config, cwd)
    if pods := list(manifests.of_pods(configs)):
        return [_first(pods, f"the containers ({', '.join(found.image for found in pods)})", cwd)]
    if any(
        isinstance(config, list) or any(isinstance(value, dict | list) for value in config.values())
        for config in configs
    ):
        known = "a compose file, a Kubernetes manifest or a llama-swap config"
        raise BadInput(f"this YAML is not {known}; give the command that starts llama-server")
    if DRIVE.search(text):
        raise BadInput("the command names a Windows path (C:\\...); write it with the paths of this machine")
    return [_script(as_shell(text), {}, cwd)]


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
        name = os.path.basename(argv[0]) if argv else "an unnamed process"
        who = f"{name} (pid {process.pid}) listens there, not llama-server"
        raise BadInput(f"port {port}: {who}; give llama-server's port or its command") from None
    environ, cwd = _allowed(process.environ, {}), _allowed(lambda: Path(process.cwd()), None)
    # it is known where it listens, also where its environment may not be read
    command = read_argv([*argv, "--port", str(port)], environ=environ, cwd=cwd)
    command.port = port
    return command


# ---- texts


def _script(
    text: str, env: Mapping[str, str], cwd: Path | None, used: Set[str] = frozenset(), notes: Sequence[str] = ()
) -> LlamaServerCommand:
    """The first llama-server that shell text starts; `env` is set where it runs, of which the text `used` some."""
    found, shell, n_started = _started(text, env, cwd)
    command = _simple(found, shell.expanded | used)
    for note in (*shell.notes, *notes):
        command.note(note)
    for name in sorted(shell.branched & (shell.expanded | shell.exported)):
        command.note(
            f"variable {name}: set in a branch of the text, which is not decided here; its last value is taken"
        )
    if n_started > 1:
        command.note(f"{n_started} commands start llama-server here: the first one is read; give the others alone")
    return command


def _started(text: str, env: Mapping[str, str], cwd: Path | None) -> tuple[Command, Shell, int]:
    """The first of the commands that start llama-server, what the shell knows, and how many these are."""
    known = {"HOME": str(Path.home()), "USER": os.environ.get("USER", ""), **dict.fromkeys(LIBRARIES, "")}
    if cwd is not None:  # a script that lies there
        known |= {"0": str(cwd / "script"), "BASH_SOURCE": str(cwd / "script")}
    try:
        shell = read_shell(text, known, env, cwd)
    except ValueError:
        raise BadInput("the command cannot be read: no closing quotation; check its quotes") from None
    started = [found for found in shell.commands if _starts_llama_server(found.words)]
    if not started:
        for found in shell.commands:  # sh -c "llama-server ..."
            inner = next((word for word in found.words[1:] if "llama-server" in word and len(word.split()) > 1), None)
            if inner is not None:
                return _started(inner, found.env | _assigned(found.words), found.cwd)
        started = [found for found in shell.commands if NEXT_FLAG.match(found.words[0])]
    if not started:
        _program_and_flags(shell.commands[0].words if shell.commands else [])
    # not `pkill llama-server` or `which llama-server`: what starts it says at least which model
    started = [found for found in started if _is_start(found.words)] or started[:1]
    return started[0], shell, len(started)


def _is_start(words: Sequence[str]) -> bool:
    return containers.is_runner(words) or any(word.startswith("-") for word in words[_start(words) + 1 :])


def _assigned(words: Sequence[str]) -> dict[str, str]:
    """Variables among the words in front of a program, as `env NAME=value program` sets them."""
    return dict(word.split("=", 1) for word in words if ASSIGNMENT.match(word))


def _simple(found: Command, expanded: Set[str]) -> LlamaServerCommand:
    """One simple command; what only a shell could answer is left out and named, as is what stands in front of it."""
    if containers.is_runner(found.words):
        return _contained(containers.of_run(found.words, found.cwd, found.open), found.cwd)
    start = _start(found.words)
    env = found.env | _assigned(found.words[:start])
    binary, flags = _program_and_flags(found.words[start:])
    command = read_flags(flags, binary=binary, environ=env, cwd=found.cwd, open=found.open)
    _note_variables(command, env.keys() - expanded)
    front = [word for word in found.words[:start] if not ASSIGNMENT.match(word)]
    if set(map(os.path.basename, front)) - PLAIN:
        command.note(f"in front of llama-server: {redacted_text(' '.join(front))}; the yard starts it without")
    return command


def _note_variables(command: LlamaServerCommand, names: Set[str]) -> None:
    for name in sorted(names):
        if not OWN_ARGS.takes(name) and not name.startswith(READ_TOO):
            command.note(f"variable {name}: not one that llama-server reads; left out")


def _first(found: Sequence[Container], where: str, cwd: Path | None) -> LlamaServerCommand:
    """The first container that runs llama-server; the others are named."""
    ours = [one for one in found if containers.IMAGE.search(one.image) or any("llama-server" in w for w in one.words)]
    if not ours:
        raise BadInput(f"no llama-server among {where}; give the file that has it")
    command = _contained(ours[0], cwd)
    if len(ours) > 1:
        command.note(f"{len(ours)} containers run llama-server here: the first one is read; give the others alone")
    return command


def _contained(container: Container, cwd: Path | None) -> LlamaServerCommand:
    """The command in a container, which its image, a shell or a wrapper in it may start."""
    words = container.words
    if words and not words[0].startswith("-") and not is_program(words[0]):
        found, shell, _ = _started(shlex.join(words), container.env, Path(container.folder))
        start = _start(found.words)
        container.words, container.folder = found.words[start:], str(found.cwd or container.folder)
        container.env |= found.env | _assigned(found.words[:start])
        container.open |= found.open
        container.notes += shell.notes
    command = container.read(cwd)
    closed = {name for name, value in container.env.items() if value not in container.open}
    _note_variables(command, closed - container.used)
    return command


def _llama_swap(config: Mapping[str, Any], cwd: Path | None) -> list[LlamaServerCommand]:
    """Every model of a llama-swap config that llama-server serves; they share llama-swap's own port."""
    shared = {str(name): str(value) for name, value in (config.get("macros") or {}).items()}
    commands, others = [], []
    for name, entry in config["models"].items():
        entry = entry if isinstance(entry, Mapping) else {}
        text = str(entry.get("cmd") or "").replace("\\\n", " ")
        macros = {**shared, **(entry.get("macros") or {}), "PORT": "0", "MODEL_ID": str(name)}
        for macro, value in [*macros.items(), *macros.items()]:  # macros may hold macros
            text = text.replace("${" + macro + "}", str(value))
        lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
        env = dict(str(word).split("=", 1) for word in entry.get("env") or [] if "=" in str(word))
        try:
            command = _script(" ".join(lines), env, cwd)
        except BadInput:
            if "llama-server" in text:
                raise
            others.append(str(name))
            continue
        command.names = [str(name), *map(str, entry.get("aliases") or [])]
        command.host, command.port = DEFAULT_HOST, SWAP_PORT
        command.notes = [note for note in command.notes if not note.startswith("--port 0")]
        commands.append(command)
    if not commands:
        raise BadInput("no model of this llama-swap config is served by llama-server; give a config that has one")
    commands[0].note(f"llama-swap: the plan has its own port {SWAP_PORT}; change yard.port if it listens elsewhere")
    if others:
        commands[0].note(f"llama-swap: not served by llama-server, and left out: {', '.join(others)}")
    return commands


def _launchd(text: str, cwd: Path | None) -> LlamaServerCommand:
    """A launchd agent: the property list of macOS."""
    try:
        job = plistlib.loads(text.strip().encode())
    except Exception as error:  # the parser of XML has errors of its own
        raise BadInput(f"this property list cannot be read: {error}") from None
    words = [str(word) for word in job.get("ProgramArguments") or ()] if isinstance(job, dict) else []
    if not words:
        raise BadInput("this property list has no ProgramArguments; give the command that starts llama-server")
    env = {str(name): str(value) for name, value in (job.get("EnvironmentVariables") or {}).items()}
    cwd = Path(job["WorkingDirectory"]) if job.get("WorkingDirectory") else cwd
    return _script(shlex.join(words), env, cwd)


# ---- the program


def _start(words: Sequence[str]) -> int:
    """Where the program stands among wrappers and variables."""
    for index, word in enumerate(words):
        if is_program(word) or (UNIFIED.match(os.path.basename(word)) and words[index + 1 : index + 2] == ["serve"]):
            return index
    return 0


def _starts_llama_server(words: Sequence[str]) -> bool:
    try:
        return containers.is_runner(words) or _program_and_flags(list(words))[0] is not None
    except BadInput:
        return False


def _program_and_flags(argv: list[str]) -> tuple[str | None, list[str]]:
    """The llama-server in `argv` (None when only flags are given) and what follows it."""
    if argv and argv[0].startswith("-"):
        return None, argv
    for index, word in enumerate(argv):
        if is_program(word):
            return word, argv[index + 1 :]
        if UNIFIED.match(os.path.basename(word)) and argv[index + 1 : index + 2] == ["serve"]:
            return word, argv[index + 2 :]
    shown = " ".join(argv[:2]) or "nothing"
    raise BadInput(f"no llama-server in the command: it runs '{shown}'; give the line that starts llama-server")


def _allowed(read: Callable[[], Any], otherwise: Any) -> Any:
    try:
        return read()
    except (psutil.Error, OSError):
        return otherwise
