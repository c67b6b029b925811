"""Every engine that Switchyard knows: a new one is a folder beside this file and a line here."""

from __future__ import annotations

from collections.abc import Mapping

from engines.driver import Driver, native_of
from engines.errors import BadInput
from engines.llama_cpp.driver import LlamaCpp
from engines.mistral_rs.driver import MistralRs, MistralRsNative

# in the order they are shown
DRIVERS: Mapping[str, Driver] = {one.name: one for one in (LlamaCpp(), MistralRs())}
NATIVE: Mapping[str, Driver] = {one.name: one for one in (MistralRsNative(),)}


def drivers() -> dict[str, Driver]:
    """Every driver of a server, by name."""
    return dict(DRIVERS)


def native_driver(name: str) -> Driver | None:
    """The driver of engine `name` without a server between; None where it has no such form."""
    return NATIVE.get(native_of(name))


def driver(name: str) -> Driver:
    """The driver called `name`; BadInput lists the known ones."""
    known = {**DRIVERS, **NATIVE}
    if name not in known:
        raise BadInput(f"unknown engine '{name}': known are {', '.join(known)}")
    return known[name]
