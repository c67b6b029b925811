"""llama-server's flags, read into neutral settings and what is passed on: what `switchyard init` starts from."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from engines.environment import SECRET
from engines.errors import BadInput
from engines.llama_cpp.flags import BESIDE, NEVER, OPTIONS, OWN_ARGS, ROUTING
from engines.llama_cpp.hub import downloaded
from engines.own_args import LIBRARIES, OFF, ON, Flag
from engines.redaction import redacted_text
from engines.settings import EngineArgs, KvType, Settings, safe_id

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8080
EVERY_HOST = "0.0.0.0"
RANDOM_SEED = 2**32 - 1
AUTO = ("auto", "-1")
ALL_LAYERS = 999  # more than any model has
OURS = ("--metrics", "--offline", "--slots")  # Switchyard's own, given to every llama-server
NO_FILE = re.compile(r"-hf |-m |--model[ =]|.*downloads this model")
KEYS = ("--api-key", "--api-key-file")
OPEN = "only the shell knows its value; left out, add it to the plan"
API_KEY_NOTE = "the key itself is not copied: export it as the environment variable that api_key_env in the plan names"

Published = dict[int, tuple[str, int]]  # port inside a container -> address and port outside
Take = Callable[["LlamaServerCommand", str, str], bool]
PROGRAM = re.compile(r"^(llama-server\S*(?<!\.gguf)|server(\.exe)?)$")


def is_program(word: str) -> bool:
    """True for the path or the name of a llama-server, older and renamed ones included."""
    return not word.startswith("-") and "=" not in word and PROGRAM.match(os.path.basename(word)) is not None


@dataclass
class LlamaServerCommand:
    """A llama-server command line in words of a plan, filled while it is read.

    `own` holds what no neutral setting says, as it stood, with absolute paths; `unknown` names the flags
    among them that no build known here lists; `notes` lists what was not taken over, and why.
    """

    binary: str | None = None
    cwd: Path | None = None
    values: dict[str, Any] = field(default_factory=dict)  # of `settings`
    gguf: Path | None = None
    repository: str | None = None  # of -hf
    repository_file: str | None = None
    names: list[str] = field(default_factory=list)  # by which clients ask for the model
    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    has_api_key: bool = False
    env: dict[str, str] = field(default_factory=dict)
    outside: Callable[[str], str] = str  # a path in its container as one of this machine
    own: EngineArgs = field(default_factory=EngineArgs)
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def settings(self) -> Settings:
        return Settings(**self.values)

    @property
    def model_id(self) -> str:
        """A name for the model that a plan accepts: the first name, else the file's, `-` for other characters."""
        name = self.names[0] if self.names else self.gguf.stem if self.gguf else ""
        return safe_id(name)

    @property
    def aliases(self) -> tuple[str, ...]:
        """Its other names, with the first one where `model_id` had to differ."""
        return tuple(dict.fromkeys(name for name in self.names if name != self.model_id))

    @property
    def why_no_file(self) -> str | None:
        """The note on a model that the command names otherwise than by a file that is known here."""
        return next((note for note in self.notes if NO_FILE.match(note)), None)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def path(self, text: str) -> Path:
        path = Path(self.outside(text)).expanduser()
        return self.cwd / path if self.cwd else path


def read_flags(
    flags: Sequence[str],
    *,
    binary: str | None = None,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    published: Published | None = None,
    outside: Callable[[str], str] = str,
    open: Set[str] = frozenset(),
) -> LlamaServerCommand:
    """What follows `llama-server` in a command, in words of a plan; `environ` is its environment, flags win over it.

    `cwd` is where the command was run, for relative paths; `published` where a container's ports are reached, `outside`
    where its files lie; `open` are words of which only the shell knows what they are. Raises BadInput, one line, for a
    value of the wrong kind or one that is missing. A key is noticed and never copied.
    """
    # what the command leaves to the engine, the plan leaves to it as well
    command = LlamaServerCommand(binary, cwd, {"parallel": 0}, outside=outside)
    for name, value in sorted((environ or {}).items()):
        _read_variable(name, value, command, is_open=value in open)
    kept = [flag for flag in OWN_ARGS.split(flags) if not (_is_open(flag, open, command) or _read(flag, command))]
    if command.repository:
        around = environ or {} if outside is not str else {**os.environ, **(environ or {})}
        kept += _from_repository(command.repository, kept, around, command)
    kept = _without_equal_kv_types(kept, command)
    if not command.settings.jinja:
        kept = [flag for flag in kept if flag.key != "--jinja"]
    for flag in kept:
        if command.values.pop(BESIDE.get(flag.key, ""), None):
            command.note(f"{flag.name}: says otherwise than a flag before it, and is kept")
    words = [word for flag in kept for word in (flag.name, *flag.values)]
    own = EngineArgs(args=tuple(words), env=command.env)
    command.own = OWN_ARGS.with_files(own, lambda name, _: str(command.path(name)))
    _agree_on_address(command, published)
    if command.gguf is None and not (command.repository or command.why_no_file):
        command.note("no model file: without -m llama-server is an empty router; give the file as gguf in the plan")
    return command


def _is_open(flag: Flag, open: Set[str], command: LlamaServerCommand) -> bool:
    """Notes a flag whose value only the shell knows; a key's value is of no interest."""
    words = (flag.name, *flag.values, *(f"{flag.name}={value}" for value in flag.values))
    if flag.key in KEYS or open.isdisjoint(words):
        return False
    command.note(f"{' '.join((flag.name, *flag.values))}: {OPEN}")
    return True


def _read_variable(name: str, value: str, command: LlamaServerCommand, *, is_open: bool) -> None:
    flag = OWN_ARGS.flag_of(name, value)
    if is_open and not (flag and flag.key in KEYS):
        if name != "PATH":
            command.note(f"variable {name}: {OPEN}")
        return
    if name in LIBRARIES:
        value = os.pathsep.join(filter(None, value.split(os.pathsep)))  # an empty one is the working directory
    if flag is not None and _read(flag, command):
        return
    if not OWN_ARGS.takes(name):
        return
    if SECRET.search(name) or redacted_text(value) != value:
        command.note(f"{name}: looks like a secret and is not copied")
    else:
        command.env[name] = value


def _read(flag: Flag, command: LlamaServerCommand) -> bool:
    """Takes one flag over, or notes why not; False for one that is passed on as it stands."""
    text = " ".join((flag.name, *flag.values))
    if flag.key in SWITCHES:
        command.values |= dict([SWITCHES[flag.key]])
        return True
    if flag.key in TAKES:
        return TAKES[flag.key](command, flag.name, flag.values[0] if flag.values else "on")
    if flag.key in ROUTING:
        raise BadInput(f"{flag.name}: {ROUTING[flag.key]}; give the command of one model, or its file with --model")
    if flag.key in NEVER:
        command.note(f"{flag.name}: not taken over: {NEVER[flag.key]}")
        return True
    if flag.option is None and not flag.name.startswith("-"):
        command.note(f"{redacted_text(text)}: not a flag; left out")
        return True
    if flag.option is None and (SECRET.search(flag.name) or redacted_text(text) != text):
        command.note(f"{flag.name}: looks like a secret and is not copied")
        return True
    if flag.option is None:
        command.unknown.append(text)
    return flag.key in OURS


# ---- what each flag means: True once it is taken over, False when it is to be passed on


def _whole(flag: str, text: str, *, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        raise BadInput(f"{flag}: '{text}' is not a whole number; write the number itself") from None
    if number < least:
        raise BadInput(f"{flag}: {number} is below {least}; llama-server does not take it")
    return number


def _number(name: str, *, own_default: int | None = None, least: int = 1) -> Take:
    """Reads a number into setting `name`; at `own_default` or below, the engine's own default is what is meant."""

    def take(command: LlamaServerCommand, flag: str, text: str) -> bool:
        number = _whole(flag, text, least=least if own_default is None else -(2**63))
        if own_default is not None and number <= own_default:
            command.values.pop(name, None)
        else:
            command.values[name] = number
        return True

    return take


def _gpu_layers(command: LlamaServerCommand, flag: str, text: str) -> bool:
    number = {"auto": -1, "all": -2}.get(text)
    number = _whole(flag, text, least=-2) if number is None else number
    command.values["gpu_layers"] = {-1: None, -2: ALL_LAYERS}.get(number, number)
    return True


def _parallel(command: LlamaServerCommand, flag: str, text: str) -> bool:
    number = _whole(flag, text, least=-1)
    command.values["parallel"] = max(number, 0)
    return True


def _flash_attention(command: LlamaServerCommand, flag: str, text: str) -> bool:
    if text not in (*ON, *OFF, *AUTO):
        raise BadInput(f"{flag}: '{text}' is not on, off or auto")
    command.values["flash_attention"] = None if text in AUTO else text in ON
    return True


def _load_mode(command: LlamaServerCommand, _: str, text: str) -> bool:
    command.values["mlock"] = text == "mmap+mlock"
    return text == "mmap+mlock"


def _seed(command: LlamaServerCommand, flag: str, text: str) -> bool:
    number = _whole(flag, text, least=-1)
    command.values["seed"] = number if 0 <= number < RANDOM_SEED else None
    return True


def _model(command: LlamaServerCommand, _: str, text: str) -> bool:
    command.gguf = command.path(text)
    return True


def _alias(command: LlamaServerCommand, _: str, text: str) -> bool:
    command.names += [name.strip() for name in text.split(",") if name.strip()]  # each -a adds to those before it
    return True


def _host(command: LlamaServerCommand, _: str, text: str) -> bool:
    # an empty one is every address to llama-server; brackets belong to a URL
    command.host = text.strip().removeprefix("[").removesuffix("]").lower() if not text.endswith(".sock") else text
    return True


def _port(command: LlamaServerCommand, flag: str, text: str) -> bool:
    command.port = _whole(flag, text, least=0)
    if command.port > 65535:
        raise BadInput(f"{flag}: {command.port} is above 65535; give a port that exists")
    return True


def _template_file(command: LlamaServerCommand, _: str, text: str) -> bool:
    command.values["chat_template"] = command.path(text)
    return True


def _repository(command: LlamaServerCommand, _: str, text: str) -> bool:
    command.repository = text
    return True


def _repository_file(command: LlamaServerCommand, _: str, text: str) -> bool:
    command.repository_file = text
    return True


def _download(command: LlamaServerCommand, flag: str, text: str) -> bool:
    command.note(f"{flag} {text}: llama-server downloads this model; a plan needs the file: give its path as gguf")
    return True


def _secret(command: LlamaServerCommand, flag: str, _: str) -> bool:
    command.has_api_key = True
    command.note(f"{flag}: {API_KEY_NOTE}")
    return True


def _jinja(command: LlamaServerCommand, _: str, __: str) -> bool:
    command.values["jinja"] = True
    return False  # the default of present builds, said all the same


def _token(command: LlamaServerCommand, flag: str, _: str) -> bool:
    command.note(f"{flag}: a download token is not copied; the plan names a file that is already here")
    return True


TAKES: dict[str, Take] = {
    "--model": _model,
    "--alias": _alias,
    "--host": _host,
    "--port": _port,
    "--ctx-size": _number("context_tokens", own_default=0),
    "--parallel": _parallel,
    "--gpu-layers": _gpu_layers,
    "--threads": _number("threads", own_default=0),
    "--batch-size": _number("batch_tokens"),
    "--ubatch-size": _number("ubatch_tokens"),
    "--flash-attn": _flash_attention,
    "--load-mode": _load_mode,
    "--cache-reuse": _number("cache_reuse_tokens", least=0),
    "--cache-ram": _number("host_cache_mib", least=-1),
    "--seed": _seed,
    "--chat-template-file": _template_file,
    "--hf-repo": _repository,
    "--hf-file": _repository_file,
    "--model-url": _download,
    "--docker-repo": _download,
    "--hf-token": _token,
    "--jinja": _jinja,
    "--api-key": _secret,
    "--api-key-file": _secret,
}
SWITCHES = {
    "--mlock": ("mlock", True),
    "--no-jinja": ("jinja", False),
    "--prefill-assistant": ("prefill_assistant", True),
    "--no-prefill-assistant": ("prefill_assistant", False),
}
KV_TYPES = ("--cache-type-k", "--cache-type-v")


def _from_repository(
    name: str, flags: Sequence[Flag], environ: Mapping[str, str], command: LlamaServerCommand
) -> list[Flag]:
    """Takes the model of `-hf` from where it was downloaded to; its projector as a flag, as llama-server loads it."""
    found = downloaded(name, command.repository_file, environ, command.outside)
    command.gguf = found.model or command.gguf
    if found.preset:
        raise BadInput(f"-hf {name}: a preset of several models, not a model; give one of its models with -m")
    if found.model is None:
        command.note(f"-hf {name}: not on this machine (it would lie in {found.folder}); name the file with --model")
    if found.projector is None or {"--mmproj", "--no-mmproj"} & {flag.key for flag in flags}:
        return []
    return [Flag("--mmproj", (str(found.projector),), OPTIONS["--mmproj"])]


def _without_equal_kv_types(flags: list[Flag], command: LlamaServerCommand) -> list[Flag]:
    """`flags` without the types of K and V where they are the same: a neutral setting says that."""
    variables = {OPTIONS[key].variable: key for key in KV_TYPES}
    given = {variables[name]: value for name, value in command.env.items() if name in variables}
    given |= {flag.key: flag.values[0] for flag in flags if flag.key in KV_TYPES}
    kinds = {given.get(key, "f16") for key in KV_TYPES}
    if not given or len(kinds) > 1 or not kinds <= set(get_args(KvType)):
        return flags
    command.values["kv_type"] = kinds.pop()
    command.env = {name: value for name, value in command.env.items() if name not in variables}
    return [flag for flag in flags if flag.key not in KV_TYPES]


# ---- the address


def _agree_on_address(command: LlamaServerCommand, published: Published | None) -> None:
    """The address as one that the yard can listen on; of a command in a container the address outside."""
    asked = command.host

    def where() -> str:
        return f"host {command.host}, port {command.port}"

    if asked.endswith(".sock"):
        command.host, command.port = DEFAULT_HOST, DEFAULT_PORT
        command.note(f"--host {asked}: the yard listens on a port, not on a socket file; the plan has {where()}")
        return
    if published is not None:
        command.host, command.port = published.get(command.port, (asked, command.port))
    command.host = command.host or EVERY_HOST
    if command.port == 0:
        command.port = DEFAULT_PORT
        command.note(f"--port 0: clients need a port that stays; the plan has {DEFAULT_PORT}")
    if command.host != "localhost" and not _is_address(command.host):
        command.host = _resolved(command.host) or DEFAULT_HOST
        why = "is written as its address" if command.host != DEFAULT_HOST else "is no address of this machine"
        command.note(f"--host {asked}: {why}; the plan has {where()}")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _resolved(host: str) -> str | None:
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError):
        return None
