"""Flags and variables of an engine that no neutral setting has a word for: read, checked and passed on as they stand.

A plan holds them as `args` and `env`. What an engine takes is data in its folder: a list of its options, and what of
them a plan says elsewhere or must not hold.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from engines.environment import SECRET
from engines.errors import BadInput
from engines.redaction import redacted_text
from engines.settings import EngineArgs

# variables of compute libraries and devices, by their beginning; an engine adds its own
# fmt: off
COMPUTE = (
    "GGML_", "CUDA_", "NVIDIA_", "NCCL_", "HIP_", "HSA_", "ROCR_", "ROCM_", "ROCBLAS_", "HIPBLASLT_", "AMD_", "GPU_",
    "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "BLIS_", "VK_", "RADV_", "MESA_", "ANV_", "SYCL_", "ONEAPI_", "ZE_",
    "ZES_", "UR_", "MUSA_", "ASCEND_", "CANN_", "MTL_", "METAL_", "MALLOC_",
)
LIBRARIES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
# fmt: on
QUIET = "quiet"
ON, OFF = ("on", "enabled", "true", "1"), ("off", "disabled", "false", "0")
NEXT_FLAG = re.compile(r"-(?!\d+(\.\d+)?$|\.\d+$|$)")  # a negative number is a value, and so is a lone dash
Files = Literal["file", "files", "scaled", "folder"]  # one, several by commas, FILE:SCALE by commas, a directory


class Option(NamedTuple):
    """One option of an engine: its spellings, its negations, what its help calls the value, its variable.

    `effect` is the field of a request that it gives a default to, "quiet" where neither answers nor what can be asked
    change, else empty.
    """

    names: tuple[str, ...]
    negations: tuple[str, ...] = ()
    value: str = ""
    variable: str = ""
    effect: str = ""

    @property
    def name(self) -> str:
        """The first long spelling, under which the tables of an engine know it."""
        return next((name for name in self.names if name.startswith("--")), self.names[0])


class Flag(NamedTuple):
    """One flag of a command with its values; `option` is None for one that the engine's list does not hold."""

    name: str
    values: tuple[str, ...] = ()
    option: Option | None = None

    @property
    def field(self) -> str | None:
        """The field of a request that it gives a default to."""
        effect = self.option.effect if self.option else ""
        return None if effect in ("", QUIET) else effect

    @property
    def default(self) -> Any:
        """The default of that field: a number, true, or what stands there."""
        text = self.values[0] if self.values else "true"
        try:
            return json.loads(text)
        except ValueError:
            return text

    @property
    def is_quiet(self) -> bool:
        return self.option is not None and self.option.effect == QUIET

    @property
    def key(self) -> str:
        """The name by which tables know it: the option's, or the first long negation of a switch that is negated."""
        if self.option is None:
            return self.name
        if self.name in self.option.negations:
            return next((name for name in self.option.negations if name.startswith("--")), self.name)
        return self.option.name


@dataclass(frozen=True)
class OwnArgs:
    """What one engine takes in `args` and `env` of a plan. Keys of the tables are long spellings or variables.

    `elsewhere` names the plan key that says it; `never` says why it is not passed on; `beside` names the setting that
    must be unset beside it; `files` are options whose values name files; `no_chat` are options that
    make it another server than one for chat, with what it then is; `prefixes` are beginnings of its own variables.
    """

    options: Mapping[str, Option] = field(default_factory=dict)
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    never: Mapping[str, str] = field(default_factory=dict)
    beside: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Files] = field(default_factory=dict)
    no_chat: Mapping[str, str] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ()

    def split(self, words: Sequence[str]) -> list[Flag]:
        """`words` flag by flag, with `--flag=value` taken apart; raises BadInput where a value is missing.

        What no list holds takes the next word as its value, unless that looks like a flag.
        """
        flags, rest = [], list(words)
        while rest:
            name, inline = self._name(rest.pop(0))
            option = self.options.get(name)
            if inline is not None:
                flags.append(Flag(name, (inline,), option))
                continue
            takes = option.value.split() if option else ["?"] if name.startswith("-") else []
            n_values = len(takes)
            while n_values and takes[n_values - 1].endswith("?") and not _is_value(rest[n_values - 1 : n_values]):
                n_values -= 1
            if len(rest) < n_values:
                raise BadInput(f"{name}: its value is missing, nothing follows it")
            flags.append(Flag(name, tuple(rest[:n_values]), option))
            del rest[:n_values]
        return flags

    def takes(self, variable: str) -> bool:
        """True for a variable of this engine, of a compute library or of a device."""
        return variable.startswith((*COMPUTE, *LIBRARIES, *self.prefixes))

    def words(self, args: Sequence[str]) -> list[str]:
        """`args` as an argv, one word for each flag and value."""
        return [word for flag in self.split(args) for word in (flag.name, *flag.values)]

    def _name(self, word: str) -> tuple[str, str | None]:
        """The flag and the value that is glued to it, if any."""
        name, equals, value = word.partition("=")
        name = name.replace("_", "-") if word.startswith("--") else name  # llama.cpp's own parser does so too
        if equals and (word.startswith("--") or name in self.options):
            return name, value
        return (word if equals else name), None

    def flag_of(self, variable: str, value: str) -> Flag | None:
        """The flag that an environment variable stands for; None for a variable that stands for none."""
        for option in set(self.options.values()):
            if not option.variable:
                continue
            if option.value and variable == option.variable:
                return Flag(option.name, (value,), option)
            if not option.value and variable == option.variable and value.lower() in (*ON, *OFF):
                names = option.names if value.lower() in ON else option.negations
                return Flag(names[-1], (), option) if names else None
            if option.negations and variable == option.variable.replace("_ARG_", "_ARG_NO_"):
                return Flag(option.negations[-1], (), option)
        return None

    def problems(self, own: EngineArgs, settings: Set[str]) -> list[str]:
        """What of `own` may not stand in a plan beside the `settings` that are set; one line each."""
        try:
            flags = self.split(own.args)
        except BadInput as error:
            return [f"args: {error}"]
        found = []
        for flag in flags:
            if why := self._why_not(flag.key, settings):
                found.append(f"args: {flag.name} {why}")
            elif not flag.name.startswith("-"):
                found.append(f"args: '{flag.name}' is no flag, and no flag before it takes a value; remove it")
            elif _is_secret(flag):
                found.append(f"args: {flag.name} holds what looks like a secret, and a plan holds none; remove it")
        for name, value in own.env.items():
            stands_for = self.flag_of(name, value)
            why = self._why_not(name, settings) or (self._why_not(stands_for.key, settings) if stands_for else None)
            if why is None and (SECRET.search(name) or redacted_text(value) != value):
                why = "is named like a secret, and a plan holds none; remove it"
            elif why is None and not self.takes(name):
                why = "is no variable of this engine or of a compute library; export it where the yard is started"
            found += [f"env: {name} {why}"] if why else []
        return found

    def _why_not(self, key: str, settings: Set[str]) -> str | None:
        if self.beside.get(key) in settings:
            return f"contradicts `settings.{self.beside[key]}`; remove one of the two"
        if key in self.elsewhere:
            return f"is said by `{self.elsewhere[key]}` in a plan; remove it here"
        return f"is not passed on: {self.never[key]}; remove it" if key in self.never else None

    def flags(self, own: EngineArgs) -> dict[str, Flag]:
        """What `own` asks of the engine by its key: variables first, since a flag wins over its variable."""
        return {flag.key: flag for flag in self.in_order(own)}

    def in_order(self, own: EngineArgs) -> list[Flag]:
        """What `own` asks of the engine, the later of two that contradict each other being the one that counts."""
        stand_for = (self.flag_of(name, value) for name, value in own.env.items())
        return [*filter(None, stand_for), *self.split(own.args)]

    def other_server(self, own: EngineArgs) -> str | None:
        """What `own` makes the engine instead of a server for chat and completions; None for one of those."""
        return next((f"{key}: {what}" for key, what in self.no_chat.items() if key in self.flags(own)), None)

    def unknown_to(self, own: EngineArgs, known: Set[str], gone: Mapping[str, str]) -> list[str]:
        """The flags of `own` that a build does not take, and what it is called there; one line each.

        `known` are the long options of its help, `gone` what that says of removed ones.
        """
        found = []
        for flag in self.split(own.args):
            others = () if flag.option is None else flag.option.names
            others = flag.option.negations if flag.option and flag.name in flag.option.negations else others
            asked = [flag.name] if flag.name.startswith("--") else [name for name in others if name.startswith("--")]
            if asked and known.isdisjoint(asked):
                new = next((name for name in others if name in known), None)
                why = gone.get(asked[0]) or (f"is called {new} there" if new else "is no option there")
                found.append(f"{flag.name}: {why}" if asked[0] in gone else f"{flag.name} {why}")
        return found

    def with_files(self, own: EngineArgs, change: Callable[[str, Files], str]) -> EngineArgs:
        """`own` with each name of a file changed."""
        words: list[str] = []
        for flag in self.split(own.args):
            words += [flag.name, *(self._changed(flag, value, change) for value in flag.values[:1]), *flag.values[1:]]
        variables = {}
        for name, value in own.env.items():
            stands_for = self.flag_of(name, value)
            variables[name] = self._changed(stands_for, value, change) if stands_for else value
        return EngineArgs(args=tuple(words), env=variables)

    def _changed(self, flag: Flag, value: str, change: Callable[[str, Files], str]) -> str:
        kind = self.files.get(flag.key)
        if kind in (None, "file", "folder"):
            return change(value, kind) if kind else value
        changed = []
        for part in value.split(","):
            name, colon, scale = part.rpartition(":") if kind == "scaled" and ":" in part else (part, "", "")
            changed.append(change(name, "file") + colon + scale)
        return ",".join(changed)


def _is_value(words: Sequence[str]) -> bool:
    return len(words) == 1 and NEXT_FLAG.match(words[0]) is None


def _is_secret(flag: Flag) -> bool:
    text = " ".join((flag.name, *flag.values))
    return (flag.option is None and SECRET.search(flag.name) is not None) or redacted_text(text) != text


def read_options(text: str) -> dict[str, Option]:
    """Options by each of their spellings, from lines `spellings / negations | value | variable | effect`."""
    found: dict[str, Option] = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            spellings, *others = (part.strip() for part in line.split(" | "))
            names, _, negations = spellings.partition(" / ")
            option = Option(
                tuple(names.split()), tuple(negations.split()), *(word.removeprefix("-") for word in others)
            )
            found |= dict.fromkeys((*option.names, *option.negations), option)
    return found
