"""The schedules of `switchyard up`: what runs, when and for how long. Free of Prefect: a terminal need not load it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from engines.units import duration


@dataclass(frozen=True)
class Schedule:
    """A deployment's hour of the night or interval, what it does, and how long it takes."""

    name: str
    does: str
    takes: str
    hour: int | None = None
    every: timedelta | None = None


EVALUATE = Schedule(
    "evaluate",
    "measures and judges both engines over every model; no soak; skipped when memory is short beside what serves",
    "minutes to hours, by the plan's blocks",
    hour=3,
)
SOAK = Schedule(
    "soak",
    "puts load on what the candidate serves, through the yard's port; nothing before a model has moved",
    "4 minutes",
    every=timedelta(minutes=10),
)
RECONCILE = Schedule(
    "reconcile", "ends what a killed run left behind, and closes its records", "seconds", every=timedelta(minutes=5)
)

UPGRADE_CHECK = Schedule(
    "upgrade-check",
    "compares the newest build that the plan's [upgrade] watch leads to; no soak, and nothing moves",
    "minutes where there is one",
    hour=5,
)


def time_zone() -> str:
    """This host's time zone by name; UTC where it has none."""
    named = os.environ.get("TZ", "").lstrip(":")
    where = os.path.realpath("/etc/localtime").partition("zoneinfo/")[2]
    return named or where or "UTC"


def schedule_lines(
    now: datetime | None = None,
    *,
    zone: str | None = None,
    last_evaluation_s: float | None = None,
    watches: bool = False,
) -> list[str]:
    """One line a schedule: what, when in local time, next, how long; `last_evaluation_s` is what one took here.

    New builds are looked for only where the plan `watches`.
    """
    zone = zone or time_zone()
    try:
        here = now.astimezone(ZoneInfo(zone)) if now else datetime.now(ZoneInfo(zone))
    except (ZoneInfoNotFoundError, ValueError):
        here = now or datetime.now().astimezone()
    lines = []
    for one in (EVALUATE, *[UPGRADE_CHECK] * watches, SOAK, RECONCILE):
        takes = one.takes
        if one is EVALUATE and last_evaluation_s is not None:
            takes = f"the last one took {duration(last_evaluation_s)}"
        if one.hour is None:
            minutes = one.every.total_seconds() / 60 if one.every else 0
            when = f"every {minutes:.0f} minutes, next within {minutes:.0f} minutes"
        else:
            due = here.replace(hour=one.hour, minute=0, second=0, microsecond=0)
            day = "today" if due > here else "tomorrow"
            when = f"every night at {one.hour:02d}:00 ({zone}), next {day} at {one.hour:02d}:00"
        lines.append(f"{one.name}: {when}; {takes}: {one.does}")
    return lines
