"""A llama-server command line, read into neutral settings: what `switchyard init` starts from.

Flags, spellings and environment names as llama-server's own `--help` lists them (builds b10434 to b11549).
"""

from __future__ import annotations

import ipaddress
import itertools
import re
import shlex
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import psutil

from engines.errors import BadInput
from engines.redaction import redacted_text
from engines.settings import KvType, Settings

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8080
EVERY_HOST = "0.0.0.0"
RANDOM_SEED = 2**32 - 1
_ANY = -(2**63)
API_KEY_NOTE = "the key itself is not copied: export it as the environment variable that api_key_env in the plan names"


@dataclass
class LlamaServerCommand:
    """A llama-server command line in neutral settings, filled while it is read.

    `passthrough` holds flags that only llama.cpp has a word for, with their values, as they stood; `unknown` holds what
    no known build lists, as (flag, value or None); `notes` lists what was not taken over, and why.
    """

    binary: str | None
    cwd: Path | None
    values: dict[str, Any] = field(default_factory=dict)  # of `settings`
    gguf: Path | None = None
    alias: str | None = None
    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    kv_types: dict[str, str] = field(default_factory=dict)
    has_api_key: bool = False
    passthrough: list[str] = field(default_factory=list)
    unknown: list[tuple[str, str | None]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def settings(self) -> Settings:
        return Settings(**self.values)

    @property
    def model_id(self) -> str:
        """A name for the model that a plan accepts: the alias, else the file's name, with `-` for other characters."""
        name = self.alias or (self.gguf.stem if self.gguf else "")
        return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "model"

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def path(self, text: str) -> Path:
        path = Path(text).expanduser()
        return self.cwd / path if self.cwd else path


def read_argv(
    argv: Sequence[str], *, environ: Mapping[str, str] | None = None, cwd: Path | None = None
) -> LlamaServerCommand:
    """The command `argv` in neutral settings; `environ` adds LLAMA_ARG_*, flags win over it.

    `cwd` is where the command was run, for a relative model path. Raises BadInput, one line, for another program, a
    value of the wrong kind or one that is missing. An API key is noticed and never copied.
    """
    binary, flags = _program_and_flags(list(argv))
    command = LlamaServerCommand(binary, cwd)
    _read(_from_environment(environ or {}, command) + flags, command)
    _conclude(command, _published(argv[: len(argv) - len(flags)]))
    return command


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


# ---- flags

Published = dict[int, tuple[str, int]] | None  # where a container's ports are reached from outside
Take = Callable[[LlamaServerCommand, str, str], None]


def _whole(flag: str, text: str, *, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        raise BadInput(f"{flag}: '{text}' is not a whole number; write the number itself") from None
    if number < least:
        raise BadInput(f"{flag}: {number} is below {least}; llama-server does not take it")
    return number


def _number(name: str, *, least: int = 1, own_default: int | None = None, note: str = "") -> Take:
    """Reads a number into setting `name`; at `own_default` or below, the engine's own default is what is meant."""

    def take(command: LlamaServerCommand, flag: str, text: str) -> None:
        number = _whole(flag, text, least=least)
        if own_default is None or number > own_default:
            command.values[name] = number
            return
        command.values.pop(name, None)
        if note:
            command.note(f"{flag} {number}: {note}")

    return take


def _gpu_layers(command: LlamaServerCommand, flag: str, text: str) -> None:
    command.values.pop("gpu_layers", None)
    if text not in ("auto", "all") and (number := _whole(flag, text, least=-2)) >= 0:
        command.values["gpu_layers"] = number
    elif text != "auto":
        command.note(f"{flag} {text}: left to the engine, which puts on the GPU what fits")


def _parallel(command: LlamaServerCommand, flag: str, text: str) -> None:
    number = _whole(flag, text, least=-1)
    if number > 0:
        command.values["parallel"] = number
        return
    command.values["parallel"] = 1
    command.note(f"{flag} {text}: {_SLOTS_NOTE}")


def _flash_attention(command: LlamaServerCommand, flag: str, text: str) -> None:
    if text not in (*_ON, *_OFF, *_AUTO):
        raise BadInput(f"{flag}: '{text}' is not on, off or auto")
    command.values["flash_attention"] = None if text in _AUTO else text in _ON


def _load_mode(command: LlamaServerCommand, flag: str, text: str) -> None:
    command.values["mlock"] = "mlock" in text.split("+")
    if text not in ("auto", "mmap", "mlock", "mmap+mlock"):
        command.passthrough += [flag, text]


def _kv_type(command: LlamaServerCommand, flag: str, text: str) -> None:
    command.kv_types["K" if flag in ("-ctk", "--cache-type-k") else "V"] = text


def _seed(command: LlamaServerCommand, flag: str, text: str) -> None:
    number = _whole(flag, text, least=-1)
    if 0 <= number < RANDOM_SEED:
        command.values["seed"] = number
    else:
        command.values.pop("seed", None)


def _model(command: LlamaServerCommand, flag: str, text: str) -> None:
    command.gguf = command.path(text)


def _template_file(command: LlamaServerCommand, flag: str, text: str) -> None:
    command.values["chat_template"] = command.path(text)


def _alias(command: LlamaServerCommand, flag: str, text: str) -> None:
    names = [name.strip() for name in text.split(",") if name.strip()]
    command.alias = names[0] if names else None
    if len(names) > 1:
        command.note(f"{flag}: only the first of {len(names)} names is taken: {names[0]}")


def _host(command: LlamaServerCommand, flag: str, text: str) -> None:
    # an empty one is every address to llama-server; brackets belong to a URL
    command.host = text.strip().removeprefix("[").removesuffix("]").lower() if not text.endswith(".sock") else text


def _port(command: LlamaServerCommand, flag: str, text: str) -> None:
    command.port = _whole(flag, text, least=0)
    if command.port > 65535:
        raise BadInput(f"{flag}: {command.port} is above 65535; give a port that exists")


def _template(command: LlamaServerCommand, flag: str, text: str) -> None:
    command.passthrough += [flag, text]
    command.note(
        f"{flag}: a template given in the command is not taken over; put it into a file and name it chat_template"
    )


def _download(command: LlamaServerCommand, flag: str, text: str) -> None:
    command.note(f"{flag} {text}: llama-server downloads this model; a plan needs the file: give its path as gguf")


def _secret(command: LlamaServerCommand, flag: str, text: str) -> None:
    command.has_api_key = True
    command.note(f"{flag}: {API_KEY_NOTE}")


def _token(command: LlamaServerCommand, flag: str, text: str) -> None:
    command.note(f"{flag}: a download token is not copied; the plan names a file that is already here")


_SLOTS_NOTE = "llama-server then chooses (4 slots in builds of 2026); the plan has 1, raise it if needed"
_CACHE_NOTE = "an unbounded prompt cache cannot be planned for; the engine's own default is used"
_ON, _OFF, _AUTO = ("on", "enabled", "true", "1"), ("off", "disabled", "false", "0"), ("auto", "-1")

# spellings of flags that take a value, the environment variable, and what the value means
_VALUES: tuple[tuple[str, str, Take], ...] = (
    ("-m --model", "LLAMA_ARG_MODEL", _model),
    ("-a --alias", "LLAMA_ARG_ALIAS", _alias),
    ("--host", "LLAMA_ARG_HOST", _host),
    ("--port", "LLAMA_ARG_PORT", _port),
    ("-c --ctx-size", "LLAMA_ARG_CTX_SIZE", _number("context_tokens", least=_ANY, own_default=0)),
    ("-np --parallel", "LLAMA_ARG_N_PARALLEL", _parallel),
    ("-ngl --gpu-layers --n-gpu-layers", "LLAMA_ARG_N_GPU_LAYERS", _gpu_layers),
    ("-t --threads", "LLAMA_ARG_THREADS", _number("threads", least=_ANY, own_default=0)),
    ("-b --batch-size", "LLAMA_ARG_BATCH", _number("batch_tokens")),
    ("-ub --ubatch-size", "LLAMA_ARG_UBATCH", _number("ubatch_tokens")),
    ("-fa --flash-attn", "LLAMA_ARG_FLASH_ATTN", _flash_attention),
    ("-ctk --cache-type-k", "LLAMA_ARG_CACHE_TYPE_K", _kv_type),
    ("-ctv --cache-type-v", "LLAMA_ARG_CACHE_TYPE_V", _kv_type),
    ("-lm --load-mode", "LLAMA_ARG_LOAD_MODE", _load_mode),
    ("--cache-reuse", "LLAMA_ARG_CACHE_REUSE", _number("cache_reuse_tokens", least=0)),
    ("-cram --cache-ram", "LLAMA_ARG_CACHE_RAM", _number("host_cache_mib", least=-1, own_default=-1, note=_CACHE_NOTE)),
    ("-s --seed", "", _seed),
    ("--chat-template-file", "LLAMA_ARG_CHAT_TEMPLATE_FILE", _template_file),
    ("--chat-template", "LLAMA_ARG_CHAT_TEMPLATE", _template),
    ("-hf -hfr --hf-repo", "LLAMA_ARG_HF_REPO", _download),
    ("-mu --model-url", "LLAMA_ARG_MODEL_URL", _download),
    ("-dr --docker-repo", "LLAMA_ARG_DOCKER_REPO", _download),
    ("-hff --hf-file", "LLAMA_ARG_HF_FILE", _download),
    ("-hft --hf-token", "", _token),
    ("--api-key", "LLAMA_API_KEY", _secret),
    ("--api-key-file", "LLAMA_ARG_API_KEY_FILE", _secret),
)

# spellings of flags that stand alone, the environment variable, what they mean and what their negation means
_SWITCHES: tuple[tuple[str, str, str], ...] = (
    ("--mlock", "LLAMA_ARG_MLOCK", "mlock"),
    ("--jinja", "LLAMA_ARG_JINJA", "jinja"),
    ("--prefill-assistant", "LLAMA_ARG_PREFILL_ASSISTANT", "prefill_assistant"),
)

TAKES_VALUE: dict[str, Take] = {name: take for names, _, take in _VALUES for name in names.split()}
STANDS_ALONE: dict[str, tuple[str, bool]] = {
    name: (setting, value)
    for flag, _, setting in _SWITCHES
    for name, value in ((flag, True), (flag.replace("--", "--no-", 1), False))
    if name != "--no-mlock"
}

# llama.cpp's own, no neutral word: kept as they stand
_ENGINE_ONLY_VALUE = """
    -tb --threads-batch -C --cpu-mask -Cr --cpu-range --cpu-strict --prio --poll -Cb --cpu-mask-batch -Crb
    --cpu-range-batch --cpu-strict-batch --prio-batch --poll-batch -n --predict --n-predict --keep --rope-scaling
    --rope-scale --rope-freq-base --rope-freq-scale --yarn-orig-ctx --yarn-ext-factor --yarn-attn-factor
    --yarn-beta-slow --yarn-beta-fast -dt --defrag-thold --rpc --numa -dev --device -ot --override-tensor -ncmoe
    --n-cpu-moe -sm --split-mode -ts --tensor-split -mg --main-gpu -fit --fit -fitt --fit-target -fitc --fit-ctx
    --override-kv --lora --lora-scaled --control-vector --control-vector-scaled --log-file --log-colors -lv --verbosity
    --log-verbosity --samplers --sampler-seq --sampling-seq --temp --temperature --top-k --top-p --min-p --top-nsigma
    --top-n-sigma --xtc-probability --xtc-threshold --typical --typical-p --repeat-last-n --repeat-penalty
    --presence-penalty --frequency-penalty --dry-multiplier --dry-base --dry-allowed-length --dry-penalty-last-n
    --dry-sequence-breaker --adaptive-target --adaptive-decay --dynatemp-range --dynatemp-exp --mirostat --mirostat-lr
    --mirostat-ent -l --logit-bias --grammar --grammar-file -j --json-schema -jf --json-schema-file
    -md -ngld -td -tbd -ctkd -ctvd -hfd -hfrd -devd --draft --draft-n --draft-max --draft-min --draft-n-min
    --draft-p-split --draft-p-min --ui-config --webui-config --ui-config-file --webui-config-file --tools-runtime
    --mcp-servers-json -lcs --lookup-cache-static -lcd --lookup-cache-dynamic
    -ctxcp --ctx-checkpoints --swa-checkpoints -cms --checkpoint-min-step -r --reverse-prompt --pooling -mm --mmproj
    -mmu --mmproj-url --image-min-tokens --image-max-tokens --mtmd-batch-max-tokens --tags --embd-normalize --path
    --cors-origins --cors-methods --cors-headers --api-prefix --tools --mcp-servers-config --ssl-key-file
    --ssl-cert-file --chat-template-kwargs -to --timeout --sse-ping-interval --threads-http --slot-save-path
    --media-path --models-dir --models-preset --models-max --reasoning-format -rea --reasoning --reasoning-effort
    --reasoning-budget --reasoning-budget-message -sps --slot-prompt-similarity --sleep-idle-seconds --log-prompts-dir
"""
_ENGINE_ONLY_SWITCH = """
    --swa-full --perf --no-perf -e --escape --no-escape -kvo --kv-offload -nkvo --no-kv-offload --repack -nr --no-repack
    --no-host --mmap --no-mmap -dio --direct-io -ndio --no-direct-io -cmoe --cpu-moe --check-tensors --op-offload
    --no-op-offload --log-disable -v --verbose --log-verbose --offline --log-prefix --no-log-prefix --log-timestamps
    --no-log-timestamps --log-jsonl --ignore-eos -bs --backend-sampling -kvu --kv-unified -no-kvu --no-kv-unified
    --cache-idle-slots --no-cache-idle-slots --context-shift --no-context-shift -sp --special --warmup --no-warmup
    --spm-infill -cb --cont-batching -nocb --no-cont-batching --mmproj-auto --no-mmproj --no-mmproj-auto
    --mmproj-offload --no-mmproj-offload --reuse-port --cors-credentials --no-cors-credentials -ag --agent -no-ag
    --no-agent --ui --webui --no-ui --no-webui --ui-mcp-proxy --webui-mcp-proxy --no-ui-mcp-proxy
    --no-webui-mcp-proxy --embedding --embeddings --rerank --reranking --cache-prompt
    --no-cache-prompt --metrics --props --slots --no-slots --models-autoload --no-models-autoload --reasoning-preserve
    --no-reasoning-preserve --skip-chat-parsing --no-skip-chat-parsing --lora-init-without-apply --spec-default
"""
ENGINE_ONLY_VALUE = frozenset(_ENGINE_ONLY_VALUE.split())
ENGINE_ONLY_SWITCH = frozenset(_ENGINE_ONLY_SWITCH.split())
# speculative decoding and model presets: many flags, renamed often
ENGINE_ONLY_FAMILY = re.compile(
    r"--(no-)?spec-.+|--.+-draft|-(Cd|Crd|Cbd|Crbd|otd|cmoed|ncmoed)|--(fim|gpt-oss|vision|embd)-.+-(default|spec)"
)


def _read(words: list[str], command: LlamaServerCommand) -> None:
    position = 0
    while position < len(words):
        flag, inline = _flag(words[position])
        rest = words[position + 1 :] if inline is None else [inline, *words[position + 1 :]]
        used = _read_one(flag, rest, command)
        position += 1 + used - (inline is not None and used > 0)


def _flag(word: str) -> tuple[str, str | None]:
    """The flag and its value, if one is glued to it: llama.cpp knows no `--flag=value`, but people write it."""
    name, equals, value = word.partition("=")
    if word.startswith("--"):
        name = name.replace("_", "-")  # as llama.cpp's own parser does
    if equals and (word.startswith("--") or name in TAKES_VALUE or name in ENGINE_ONLY_VALUE):
        return name, value
    return (word if equals else name), None


def _read_one(flag: str, rest: list[str], command: LlamaServerCommand) -> int:
    """Reads one flag; how many of `rest` were its value: of a flag in no table, what does not look like a flag."""
    if flag in ("-fa", "--flash-attn") and _is_next_flag(rest):
        command.values["flash_attention"] = True  # builds before August 2025: a switch without a value
        return 0
    if flag in STANDS_ALONE:
        setting, is_on = STANDS_ALONE[flag]
        command.values[setting] = is_on
        return 0
    if flag in TAKES_VALUE:
        TAKES_VALUE[flag](command, flag, _needed(flag, rest))
        return 1
    if flag == "--log-colors" and _is_next_flag(rest):  # older builds: a switch without a value
        command.passthrough.append(flag)
        return 0
    if flag in ENGINE_ONLY_VALUE:
        command.passthrough += [flag, _needed(flag, rest)]
        return 1
    if flag in ENGINE_ONLY_SWITCH:
        command.passthrough.append(flag)
        return 0
    if flag == "--control-vector-layer-range":
        command.passthrough += [flag, *rest[:2]]
        return len(rest[:2])
    value = rest[0] if flag.startswith("-") and not _is_next_flag(rest) else None
    if ENGINE_ONLY_FAMILY.fullmatch(flag):
        command.passthrough += [flag] if value is None else [flag, value]
    else:
        command.unknown.append((flag, _unless_secret(flag, value)))
    return 0 if value is None else 1


def _needed(flag: str, rest: list[str]) -> str:
    if not rest:
        raise BadInput(f"{flag}: its value is missing; the command ends there")
    return rest[0]


def _unless_secret(name: str, value: str | None) -> str | None:
    hidden = value and (re.search("key|token|secret|password", name, re.IGNORECASE) or redacted_text(value) != value)
    return "(not shown)" if hidden else value


def _is_next_flag(rest: list[str]) -> bool:
    """True when no value comes next: nothing is left, or another flag (a negative number is a value)."""
    return not rest or (rest[0].startswith("-") and not re.fullmatch(r"-\d+(\.\d+)?", rest[0]))


def _from_environment(environ: Mapping[str, str], command: LlamaServerCommand) -> list[str]:
    """LLAMA_ARG_* as flags, to be read before the command's own, which win over them."""
    flags: list[str] = []
    for names, variable, _ in _VALUES:
        if environ.get(variable):
            flags += [names.split()[-1], environ[variable]]
    for flag, variable, _ in _SWITCHES:
        no = flag.replace("--", "--no-", 1)
        if variable in environ and environ[variable].lower() in (*_ON, *_OFF):
            flags += [flag] if environ[variable].lower() in _ON else [no] if no in STANDS_ALONE else []
        if variable.replace("ARG_", "ARG_NO_") in environ and no in STANDS_ALONE:
            flags.append(no)
    known = {variable for _, variable, _ in (*_VALUES, *_SWITCHES)}
    known |= {variable.replace("ARG_", "ARG_NO_") for _, variable, _ in _SWITCHES}
    others = sorted(name for name in environ if name.startswith("LLAMA_ARG_") and name not in known)
    command.unknown += [(name, _unless_secret(name, environ[name])) for name in others]
    return flags


def _conclude(command: LlamaServerCommand, published: Published) -> None:
    """Add what only the whole command shows."""
    _agree_on_address(command, published)
    kinds = {side: command.kv_types.get(side, "f16") for side in ("K", "V")}
    if kinds["K"] == kinds["V"] and kinds["K"] in get_args(KvType) and command.kv_types:
        command.values["kv_type"] = kinds["K"]
    elif command.kv_types:
        given = f"KV cache types K {kinds['K']}, V {kinds['V']}"
        known = ", ".join(get_args(KvType))
        command.note(f"{given}: a plan takes one of {known} for both; the engine's default is used")
    if "parallel" not in command.values:
        command.note(f"no --parallel: {_SLOTS_NOTE}")
    if command.gguf is None and not any("downloads this model" in note for note in command.notes):
        command.note("no model file: without -m llama-server is an empty router; give the file as gguf in the plan")
    for name, value in command.unknown:
        shown = name if value is None else f"{name} {value}"
        why = "not a flag of any known llama-server" if name.startswith("-") else "not a flag"
        why = "set in the environment, and no neutral setting" if name.startswith("LLAMA_ARG_") else why
        command.note(f"{shown}: {why}; left out")


def _agree_on_address(command: LlamaServerCommand, published: Published) -> None:
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
    if command.host == "localhost":
        return
    try:
        ipaddress.ip_address(command.host)
    except ValueError:
        command.host = _resolved(command.host) or DEFAULT_HOST
        why = "is written as its address" if command.host != DEFAULT_HOST else "is no address of this machine"
        command.note(f"--host {asked}: {why}; the plan has {where()}")


def _resolved(host: str) -> str | None:
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError):
        return None


def _published(words: Sequence[str]) -> Published:
    """Where a container's port is reached from outside, by `-p [[IP:]HOST:]CONTAINER` in `words`; None without one."""
    pairs = itertools.pairwise(words)
    given = [after for word, after in pairs if word in ("-p", "--publish")]
    given += [word.partition("=")[2] for word in words if word.startswith("--publish=")]
    found = [match for text in reversed(given) if (match := _PUBLISHED.fullmatch(text))]  # of two the first counts
    ports = {int(m["inside"]): (m["ip"] or EVERY_HOST, int(m["outside"])) for m in found if m["outside"]}
    return ports if found else None


# ---- the process on a port


def _allowed(read: Callable[[], Any], otherwise: Any) -> Any:
    try:
        return read()
    except (psutil.Error, OSError):
        return otherwise
