"""Every engine that Switchyard knows: a new one is a folder beside this file and a line here."""

from __future__ import annotations

from engines.driver import Driver, native_of
from engines.errors import BadInput
from engines.llama_cpp.driver import LlamaCpp
from engines.mistral_rs.driver import MistralRs, MistralRsNative

# in the order they are shown
DRIVERS: dict[str, Driver] = {one.name: one for one in (LlamaCpp(), MistralRs())}
NATIVE: dict[str, Driver] = {one.name: one for one in (MistralRsNative(),)}


def native_driver(name: str) -> Driver | None:
    """The driver of engine `name` without a server between; None where it has no such form."""
    return NATIVE.get(native_of(name))


def known_engines() -> tuple[str, ...]:
    """Every engine's name, native forms last."""
    return (*DRIVERS, *NATIVE)


def driver(name: str) -> Driver:
    """The driver called `name`; BadInput lists the known ones."""
    if name not in known_engines():
        raise BadInput(f"unknown engine '{name}': known are {', '.join(known_engines())}")
    return DRIVERS.get(name) or NATIVE[name]
