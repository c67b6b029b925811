"""What differs between engines, as the `Driver` protocol; all else is shared.

A driver is stateless; `engines.process.serving` starts, awaits and stops what it describes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from engines import environment
from engines.errors import BadInput
from engines.home import engines_folder
from engines.model.digest import model_digest
from engines.model.header import Header
from engines.model.loads import Loads, parse_version
from engines.model.memory import MemoryCase, Part
from engines.openai.dialect import Dialect
from engines.openai.paths import Paths
from engines.openai.public import Public
from engines.own_args import COMPUTE, OwnArgs
from engines.settings import EngineArgs, Serve, Settings

# method, path, body, seconds -> status and JSON, None where it is none; raises OSError, ValueError
Ask = Callable[[str, str, Mapping[str, object] | None, float | None], tuple[int, Any]]
LONG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
Form = Literal["auto", "binary", "hosted"]
Found = Literal["binary", "hosted", "native", "attached"]


@dataclass(frozen=True)
class Installation:
    """One engine as found on this machine. A native one is no server: the yard talks to it in frames.

    An attached one answers at `url`, and others run it; the variable `key_env` holds the key that it wants.

    `engine` is its name in the plan, by default its `kind`; the kind says which driver it has.
    `program` is the argv prefix; `flags` are the long options its own `--help` lists, so that no flag is passed that
    this build does not know, and `gone` those that it lists as removed; `libraries` goes in front of LD_LIBRARY_PATH.
    `note` is why it was taken, where that needs saying.
    """

    engine: str
    form: Found
    program: tuple[str, ...]
    version: str
    flags: frozenset[str] = frozenset()
    gone: Mapping[str, str] = field(default_factory=dict)
    libraries: Path | None = None
    where: str = ""
    kind: str = ""
    build: str = ""  # `build_digest`, where it was asked for
    url: str = ""
    key_env: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", self.kind or self.engine)

    def knows(self, flag: str) -> bool:
        return flag in self.flags

    @property
    def is_overheard(self) -> bool:
        """Whether what is sent to it crosses a network as it stands."""
        return self.url.startswith("http:") and not environment.is_loopback(urlsplit(self.url).hostname or "")


@dataclass(frozen=True)
class Installer:
    """How an engine gets onto this machine: pip packages by default, the vendor's script or a crate when asked for."""

    pip: tuple[str, ...]
    script_url: str | None = None
    script_version: str | None = None
    script_env: Mapping[str, str] = field(default_factory=dict)  # has it install that version without asking
    crate: str = ""  # NAME==VERSION on crates.io
    crate_program: str = ""  # that it installs


class Driver(Protocol):
    """The part of an engine that is its own."""

    name: str
    installer: Installer
    progress_path: str  # GET: how far the requests in flight are; answered by the engine's own loop
    sees_prompt_progress: bool  # that moves while a prompt is read, before the first token
    own_args: OwnArgs  # what it takes of `args` and `env` in a plan
    probe_is_neutral: bool  # a one-token completion takes no client's prompt out of the engine's cache

    def find(self, form: Form = "auto", binary: Path | None = None) -> Installation:
        """The engine on this machine; raises EngineNotFound with how to install it."""

    def argv(self, installation: Installation, serve: Serve) -> list[str]:
        """The command that serves: neutral words in, flags out. Pure; holds no secret."""

    def environment(self, installation: Installation, serve: Serve, base: Mapping[str, str]) -> dict[str, str]:
        """The child's environment: `base` without stray engine variables, with what this engine needs."""

    def loads(self, header: Header, version: str | None = None) -> Loads:
        """Whether this engine at `version` (None: not known) loads the model, and why."""

    def clashes(self, settings: Settings, own: EngineArgs) -> list[str]:
        """Settings and flags that this engine refuses together at its start, one line each."""

    def memory_parts(self, case: MemoryCase) -> list[Part]:
        """Everything that takes memory while this engine serves the model."""

    def memory_notes(self, case: MemoryCase) -> list[str]:
        """What to know about these figures, one line each."""

    def unsupported(self, installation: Installation, serve: Serve) -> list[str]:
        """What was asked for and this engine cannot honour, one line each: named, never dropped quietly."""

    def cache_budget(self, settings: Settings) -> str:
        """How much host memory this engine may fill with cached prompts: growth up to there is no leak."""

    def progress(self, answer: bytes) -> tuple[int, ...]:
        """Counters in an answer from `progress_path`: they change when a prompt or tokens move; () where it has none.

        Raises ValueError for an answer that is not this engine's.
        """

    def served_name(self, installation: Installation, model_id: str) -> str:
        """The model's name that this engine answers to."""

    def paths(self, installation: Installation, own: EngineArgs) -> Paths:
        """What it answers beside GET, started with `own`."""

    def public(self, own: EngineArgs) -> Public:
        """What it shows to clients without a key and to pages of other origins, started with `own`."""

    def dialect(self, installation: Installation) -> type[Dialect]:
        """Brings its requests and answers to the shapes of llama.cpp's server, for which clients were written."""

    def neutral_body(self) -> dict[str, object] | None:
        """Request fields that keep prompts from its cache while speed is measured; None where no field does that."""


def native_of(name: str) -> str:
    """The name under which engine `name` runs without a server between: a third place for a candidate."""
    return f"{name}-native"


def executable(binary: Path, what: str) -> Path:
    """The file that a plan's `binary` names; BadInput when it cannot be run as `what`."""
    path = binary.expanduser()
    if not _is_executable(path):
        raise BadInput(f"{binary}: no executable file; name {what} that can be run")
    return path


def another_program(binary: Path, what: str, said: str) -> BadInput:
    """The error of a `binary` that runs and is not `what`, by what it `said` of itself."""
    first = next(filter(None, map(str.strip, said.splitlines())), "nothing")
    return BadInput(f"{binary} is not {what}: it says {first[:80]!r} of itself; name {what}")


def first_executable(name: str, places: Iterable[str | Path]) -> Path | None:
    """The program `name` on PATH, else the first of `places` that can be run."""
    on_path = shutil.which(name)
    candidates = [*([on_path] if on_path else []), *places]
    return next(filter(_is_executable, (Path(place).expanduser() for place in candidates)), None)


def got_for_this_user(name: str) -> list[Path]:
    """The program `name` in each `NAME-VERSION/bin` under `engines_folder`, the newest first."""
    found = ((parse_version(one.name.removeprefix(f"{name}-")), one) for one in engines_folder().glob(f"{name}-*"))
    return [one / "bin" / name for _, one in sorted((v, one) for v, one in found if v is not None)][::-1]


def _is_executable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def flags_of(*pairs: tuple[str, object]) -> list[str]:
    """`--flag value` of each pair whose value is not None."""
    return [word for flag, value in pairs if value is not None for word in (flag, str(value))]


def build_digest(found: Installation) -> str:
    """`sha256:...` of a binary and of the shared libraries beside it; "" for a wheel, which its version names.

    A version names no build: in one release the program is a stub of 15 kB and the code lies in its libraries.
    """
    if found.form != "binary":
        return ""
    program = Path(shutil.which(found.program[0]) or found.program[0])
    libraries = sorted(found.libraries.glob("*.so*")) if found.libraries else []
    digests = []
    for file in (program, *libraries):
        with contextlib.suppress(OSError):  # a dangling link
            digests.append(f"{file.name} {_digest_at(file.resolve(), file.stat().st_size, file.stat().st_mtime_ns)}")
    return f"sha256:{hashlib.sha256(' '.join(digests).encode()).hexdigest()}"


@cache
def _digest_at(file: Path, size: int, changed_ns: int) -> str:
    return model_digest(file)


def help_flags(text: str) -> frozenset[str]:
    """The long options that a `--help` text lists, without those of which it says that they are gone."""
    return frozenset(LONG.findall(text)) - gone_flags(text).keys()


def gone_flags(text: str) -> dict[str, str]:
    """Long options that a build lists and refuses, with what its `--help` says instead."""
    found: dict[str, str] = {}
    for entry in re.findall(r"^-.*(?:\n[ \t].*)*", text, re.MULTILINE):
        names, removed, instead = " ".join(entry.split()).partition("the argument has been removed")
        if removed:
            found |= dict.fromkeys(LONG.findall(names), f"{removed}{instead.partition(' (env:')[0]}")
    return found


def probe(
    program: list[str], *arguments: str, env: Mapping[str, str] | None = None, timeout_s: float = 20
) -> str | None:
    """What an engine's program prints (both streams) for `arguments`; None when it cannot be run or is too slow."""
    try:
        done = subprocess.run(
            [*program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment.of_child(environment.of_engine(os.environ if env is None else env)),
            timeout=timeout_s,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None


def scrubbed(base: Mapping[str, str], prefixes: tuple[str, ...]) -> dict[str, str]:
    """`base` without variables that would change an engine behind our back, or that it must not see.

    Those of compute libraries and devices come from the plan alone: the same engine then starts in every shell.
    """
    names = (*prefixes, *COMPUTE)
    return {key: value for key, value in environment.of_engine(base).items() if not key.startswith(names)}
