"""Every compatibility behaviour by name, and the set that a tool-calling agent needs.

To add one, write a function under `@behaviour(group, claim)` in the module of its group below: it asks the engine and
returns an Observation. Its name is the behaviour's id in plans and records. Add a habit that breaks it to
tests/tasks/evidence/test_compatibility.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from tasks.evidence.behaviours import chat, limits, output, sampling, server, tools
from tasks.evidence.behaviours.base import Behaviour

BEHAVIOURS: Mapping[str, Behaviour] = MappingProxyType(
    {
        name: found
        for module in (chat, limits, sampling, tools, output, server)
        for name, found in vars(module).items()
        if isinstance(found, Behaviour)
    }
)
DEFAULT_REQUIRED: frozenset[str] = frozenset(name for name, entry in BEHAVIOURS.items() if entry.required)
