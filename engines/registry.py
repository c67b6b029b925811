"""Every engine that Switchyard knows: a new one is a folder beside this file and a line here."""

from __future__ import annotations

from engines.attached.dialects import PLAIN, SERVERS
from engines.attached.driver import Attached
from engines.driver import Driver, native_of
from engines.errors import BadInput
from engines.llama_cpp.driver import LlamaCpp
from engines.mistral_rs.driver import MistralRs, MistralRsNative
from engines.ollama.driver import Ollama
from engines.vllm.driver import Vllm

# in the order they are shown
DRIVERS: dict[str, Driver] = {one.name: one for one in (LlamaCpp(), MistralRs(), Ollama(), Vllm())}
DIRECTORIES = frozenset({Vllm.name})  # engines that are given a directory of float weights, not a GGUF
ATTACHED = "openai"  # the kind of an engine that is attached; one that speaks as another has `openai:OTHER`
PYTHONS = DIRECTORIES | {LlamaCpp.name}  # engines that can run in a Python environment of their own
WHEELS = frozenset({LlamaCpp.wheel})  # that our host runs, in ours or in an environment of their own
NATIVE: dict[str, Driver] = {one.name: one for one in (MistralRsNative(),)}


def native_driver(name: str) -> Driver | None:
    """The driver of engine `name` without a server between; None where it has no such form."""
    return NATIVE.get(native_of(name))


def is_attached(kind: str) -> bool:
    return kind.partition(":")[0] == ATTACHED


def attached(kind: str) -> Attached:
    """The driver of an engine that is attached. Raises BadInput for a dialect that is not known."""
    speaks = kind.partition(":")[2]
    if speaks and speaks not in SERVERS:
        raise BadInput(f"unknown dialect '{speaks}'; known: {', '.join(SERVERS)}, and none for a plain server")
    return Attached(kind, SERVERS.get(speaks, PLAIN), DRIVERS.get(speaks))


def known_engines() -> tuple[str, ...]:
    """Every engine's name, native forms and those that are attached last."""
    return (*DRIVERS, *NATIVE, ATTACHED)


def driver(name: str) -> Driver:
    """The driver called `name`; BadInput lists the known ones."""
    if is_attached(name):
        return attached(name)
    if name not in known_engines():
        raise BadInput(f"unknown engine '{name}': known are {', '.join(known_engines())}")
    return DRIVERS.get(name) or NATIVE[name]
