"""llama-server commands as people have them: typed, in a script, unit, compose file or llama-swap config, or running.

Read, never executed.
"""

from __future__ import annotations

import os
import plistlib
import re
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import psutil
import yaml

from engines.errors import BadInput
from engines.llama_cpp import containers
from engines.llama_cpp.argv import LlamaServerCommand, is_program, read_flags
from engines.llama_cpp.flags import OWN_ARGS
from engines.llama_cpp.shell import Command, read_shell

UNIFIED = re.compile(r"^llama(\.exe)?$")
ASSIGNMENT = re.compile(r"^[A-Za-z_]\w*=")
SECTION = re.compile(r"^\s*\[(\w+)\]\s*$", re.MULTILINE)
SPECIFIER = re.compile(r"%([%hutT])")
INTERPOLATED = re.compile(r"\$\$|\$\{(?P<name>\w+)(?::?-(?P<default>[^}]*)|:?\?[^}]*)?\}|\$(?P<bare>[A-Za-z_]\w*)")
WINDOWS = re.compile(r"(?<![A-Za-z])[A-Za-z]:\\")
CONTINUED = re.compile(r"[ \t][\^`][ \t]*\r?\n")  # a line goes on: cmd.exe, PowerShell
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
    if WINDOWS.search(text):
        raise BadInput("the command names a Windows path (C:\\...); write it with the paths of this machine")
    text = CONTINUED.sub(" ", text)
    if "<plist" in text:
        return [_launchd(text, cwd)]
    tables = _tables(text)
    for config in tables:
        if isinstance(config.get("services"), dict):
            return [_compose(config["services"], cwd)]
        if isinstance(config.get("models"), dict):
            return _llama_swap(config, cwd)
    if pods := [found for config in tables for found in _containers(config)]:
        return [_pod(pods, cwd)]
    if any(isinstance(value, dict | list) for config in tables for value in config.values()):
        known = "a compose file, a Kubernetes manifest or a llama-swap config"
        raise BadInput(f"this YAML is not {known}; give the command that starts llama-server")
    if (SECTION.search(text) and "=" in text) or re.match(r"\s*Exec(Start)?\s*=", text):
        return [_unit(text, cwd)]
    return [_script(text, {}, cwd)]


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


def _script(text: str, env: Mapping[str, str], cwd: Path | None) -> LlamaServerCommand:
    """The first llama-server that shell text starts; `env` is set where it runs."""
    try:
        shell = read_shell(text, {"HOME": str(Path.home()), "USER": os.environ.get("USER", "")}, env, cwd)
    except ValueError:
        raise BadInput("the command cannot be read: no closing quotation; check its quotes") from None
    started = [found for found in shell.commands if _starts_llama_server(found.words)]
    if not started:
        for found in shell.commands:  # sh -c "llama-server ..."
            inner = next((word for word in found.words[1:] if "llama-server" in word and " " in word), None)
            if inner is not None:
                return _script(inner, found.env | _assigned(found.words), found.cwd)
        started = [found for found in shell.commands if found.words[0].startswith("-")]
    if not started:
        _program_and_flags(shell.commands[0].words if shell.commands else [])
    # not `pkill llama-server` or `which llama-server`: what starts it says at least which model
    started = [found for found in started if _is_start(found.words)] or started[:1]
    command = _simple(started[0], shell.expanded)
    for note in shell.notes:
        command.note(note)
    if len(started) > 1:
        command.note(f"{len(started)} commands start llama-server here: the first one is read; give the others alone")
    return command


def _is_start(words: Sequence[str]) -> bool:
    return containers.is_runner(words) or any(word.startswith("-") for word in words[_start(words) + 1 :])


def _assigned(words: Sequence[str]) -> dict[str, str]:
    """Variables among the words in front of a program, as `env NAME=value program` sets them."""
    return dict(word.split("=", 1) for word in words if ASSIGNMENT.match(word))


def _simple(found: Command, expanded: Set[str]) -> LlamaServerCommand:
    """One simple command; what only a shell could answer is left out and named, as are variables of no use."""
    words, opened = _without_open(found)
    if containers.is_runner(words):
        command = containers.of_run(words).read(found.cwd)
    else:
        start = _start(words)
        env = found.env | _assigned(words[:start])
        command = read_argv(words[start:], environ=env, cwd=found.cwd)
        for name in sorted(env.keys() - expanded):
            if not OWN_ARGS.takes(name) and not name.startswith(("LLAMA_", "HF_", "XDG_", "HOME", "HUGGINGFACE_")):
                command.note(f"variable {name}: not one that llama-server reads; left out")
    for note in opened:
        command.note(note)
    return command


def _without_open(found: Command) -> tuple[list[str], list[str]]:
    """The words without flags whose value only a shell knows, and a note for each of these."""
    words: list[str] = []
    notes = []
    for word in found.words:
        is_key = words[-1:] in (["--api-key"], ["--api-key-file"])  # whose value is never copied
        if word not in found.open or is_key or is_program(word):
            words.append(word)
            continue
        flag = words.pop() if words and words[-1].startswith("-") else ""
        notes.append(f"{flag} {word}: only the shell knows its value; left out, add it to the plan".strip())
    for name, value in list(found.env.items()):
        if value in found.open:
            notes.append(f"variable {name}: only the shell knows its value; left out, add it to the plan")
            del found.env[name]
    return words, notes


def _unit(text: str, cwd: Path | None) -> LlamaServerCommand:
    """A systemd unit or a quadlet, or a line of one."""
    sections: dict[str, dict[str, list[str]]] = {}
    section = sections.setdefault("", {})
    for line in text.replace("\r\n", "\n").replace("\\\n", " ").splitlines():
        if found := SECTION.match(line):
            section = sections.setdefault(found[1], {})
        elif "=" in line and not line.lstrip().startswith(("#", ";")):
            key, _, value = line.partition("=")
            section.setdefault(key.strip(), []).append(SPECIFIER.sub(_specified, value.strip()))
    whole = {**sections.get("", {}), **sections.get("Service", {}), **sections.get("Container", {})}
    assigned = [word for text in whole.get("Environment", ()) for word in _words(text) if "=" in word]
    variables = dict(word.split("=", 1) for word in assigned)
    cwd = Path(whole["WorkingDirectory"][-1]) if whole.get("WorkingDirectory") else cwd
    if "Container" in sections:
        container = containers.of_quadlet(whole, _words(whole.get("Exec", [""])[-1]))
        container.env |= variables
        command = container.read(cwd)
    else:
        line = whole.get("ExecStart", whole.get("Exec", [""]))[-1]
        command = _script(re.sub(r"^[-@:+!|]*", "", line), variables, cwd)
    for name in whole.get("EnvironmentFile", ()):
        command.note(f"EnvironmentFile {name}: another file, which is not read; its variables are missing here")
    return command


def _specified(found: re.Match[str]) -> str:
    known = {"%": "%", "h": str(Path.home()), "u": os.environ.get("USER", "root"), "t": "/run", "T": "/tmp"}
    return known[found[1]]


def _compose(services: Mapping[str, Any], cwd: Path | None) -> LlamaServerCommand:
    """The first service of a compose file that runs llama-server."""
    unknown: list[str] = []
    for service in _interpolated(services, unknown).values():
        if not isinstance(service, Mapping):
            continue
        words = [*_words(service.get("entrypoint")), *_words(service.get("command"))]
        if (started := _started_in(service, words)) is not None:
            container = containers.of_service(service, started)
            container.notes += [f"${name}: not set in the compose file; its value is missing here" for name in unknown]
            return container.read(cwd)
    raise BadInput(f"no llama-server among the services ({', '.join(map(str, services))}); give the file that has it")


def _started_in(container: Mapping[str, Any], words: Sequence[str]) -> Sequence[str] | None:
    """The words of a llama-server that a container starts, by its command or its image; None where it starts none."""
    if _starts_llama_server(words):
        return words[_start(words) :]
    return words if containers.IMAGE.search(str(container.get("image") or "")) else None


def _interpolated(value: Any, unknown: list[str]) -> Any:
    """`value` with `${NAME:-default}` and `$$` replaced in every text; names without a default go to `unknown`."""

    def replaced(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        if found["default"] is None:
            unknown.append(found["name"] or found["bare"])
            return found[0]
        return found["default"]

    if isinstance(value, Mapping):
        return {key: _interpolated(item, unknown) for key, item in value.items()}
    if isinstance(value, list):
        return [_interpolated(item, unknown) for item in value]
    return INTERPOLATED.sub(replaced, value) if isinstance(value, str) else value


def _llama_swap(config: Mapping[str, Any], cwd: Path | None) -> list[LlamaServerCommand]:
    """Every model of a llama-swap config that llama-server serves; they share llama-swap's own port."""
    macros = {str(name): str(value) for name, value in (config.get("macros") or {}).items()}
    commands = []
    for name, entry in config["models"].items():
        text = str(entry.get("cmd") or "") if isinstance(entry, Mapping) else ""
        for macro, value in [*macros.items(), *macros.items(), ("PORT", "0"), ("MODEL_ID", str(name))]:
            text = text.replace("${" + macro + "}", value)  # macros may hold macros
        lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
        env = dict(str(word).split("=", 1) for word in entry.get("env") or [] if "=" in str(word)) if entry else {}
        if "llama-server" not in text:
            continue
        command = _script(" ".join(lines), env, cwd)
        command.names = [str(name), *map(str, entry.get("aliases") or [])]
        command.port = SWAP_PORT
        command.notes = [note for note in command.notes if not note.startswith("--port 0")]
        commands.append(command)
    if not commands:
        raise BadInput("no model of this llama-swap config is served by llama-server; give a config that has one")
    commands[0].note(f"llama-swap: the plan has its own port {SWAP_PORT}; change yard.port if it listens elsewhere")
    return commands


def _tables(text: str) -> list[dict[Any, Any]]:
    """The text's YAML documents that are tables; none where it is no YAML."""
    try:
        return [found for found in yaml.safe_load_all(text) if isinstance(found, dict)]
    except yaml.YAMLError:
        return []


def _containers(value: Any) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Every container of a Kubernetes manifest, with the pod's spec it belongs to."""
    if isinstance(value, list):
        return [found for item in value for found in _containers(item)]
    if not isinstance(value, Mapping):
        return []
    own = value.get("containers")
    found = [(one, value) for one in own if isinstance(one, Mapping)] if isinstance(own, list) else []
    return found + [inner for name, item in value.items() if name != "containers" for inner in _containers(item)]


def _pod(found: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], cwd: Path | None) -> LlamaServerCommand:
    """The first container of a Kubernetes manifest that runs llama-server."""
    for one, spec in found:
        words = [str(word) for word in (*(one.get("command") or ()), *(one.get("args") or ()))]
        if len(words) > 1 and " " in words[-1] and "llama-server" in words[-1]:  # sh -c "llama-server ..."
            return _script(words[-1], _of_pod(one, spec, words).env, cwd)
        if (started := _started_in(one, words)) is not None:
            return _of_pod(one, spec, started).read(cwd)
    names = ", ".join(str(one.get("name") or one.get("image")) for one, _ in found)
    raise BadInput(f"no llama-server among the containers ({names}); give the manifest that has it")


def _of_pod(one: Mapping[str, Any], spec: Mapping[str, Any], words: Sequence[str]) -> containers.Container:
    """The container with its ports as published, its host paths as mounts, and a note on each value kept elsewhere."""
    variables = [each for each in one.get("env") or () if isinstance(each, Mapping)]
    paths = {each.get("name"): (each.get("hostPath") or {}).get("path") for each in spec.get("volumes") or ()}
    service = {
        "image": one.get("image"),
        "environment": [f"{each['name']}={each['value']}" for each in variables if "value" in each],
        "ports": [
            {"published": each.get("hostPort") or each.get("containerPort"), "target": each.get("containerPort")}
            for each in one.get("ports") or ()
        ],
        "volumes": [
            {"source": paths[each.get("name")], "target": each.get("mountPath")}
            for each in one.get("volumeMounts") or ()
            if paths.get(each.get("name"))
        ],
    }
    container = containers.of_service(service, words)
    elsewhere = [str(each.get("name")) for each in variables if "value" not in each]
    elsewhere += ["envFrom"] if one.get("envFrom") else []
    container.notes += [f"variable {name}: its value is kept in the cluster; left out" for name in elsewhere]
    container.notes += [
        f"volume {each.get('name')} at {each.get('mountPath')}: not a path of a host; give the file with --model"
        for each in one.get("volumeMounts") or ()
        if not paths.get(each.get("name"))
    ]
    return container


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
    if len(words) > 2 and words[-2] in ("-c", "-lc"):  # sh -c "llama-server ..."
        return _script(words[-1], env, cwd)
    return _simple(Command(words, env, cwd, set()), set())


def _words(value: Any) -> list[str]:
    """The words of a command: a list as it is, a text as a shell splits it."""
    if isinstance(value, list):
        return [str(word) for word in value]
    try:
        commands = read_shell(f"x {value}" if value else "", {"HOME": str(Path.home())}, {}).commands
    except ValueError:
        raise BadInput("the command cannot be read: no closing quotation; check its quotes") from None
    return [word for command in commands[:1] for word in command.words[1:]]


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
