"""The record of a check that was not carried out, and the verdict on that record.

An engine that does not start, a measurement that raised an error and a check left out on purpose are stored like any
other evidence, so that a verdict stays a function of the records.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from sqlalchemy.exc import SQLAlchemyError

from engines.errors import (
    BadInput,
    EngineError,
    EngineNotEnded,
    EngineNotFound,
    PortTaken,
    SwitchyardError,
    WrongListener,
)
from tasks.records.store import Records
from tasks.verdicts.verdict import CheckResult, Verdict

KIND = "unmeasured"  # the kind of such evidence; its key says which check
LAUNCH = "launch"  # the check that an engine starts with the model
SOAK_LEFT_OUT = "soak.left_out"  # the check that a scheduled evaluation does not carry out
PASS_WITHOUT_SOAK = "PASS without a soak"  # the result of an evaluation whose gate only that keeps shut
LOG_LINES = 20
SHOWN_LINES = 3
WHY_CHARS = 600
# caused by the machine or another process, whichever engine it hit
_ENVIRONMENT = (EngineNotEnded, EngineNotFound, PortTaken, WrongListener)
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_ERROR_WORDS = re.compile(r"error|panic|exception|unsupported|not supported|out of memory|abort|corrupt", re.IGNORECASE)
_LOG_PREFIX = re.compile(r"^[\d.:TZ\s-]+(?:[A-Z]\s+)?")
# the areas of the report, where they are not the first word of the check's own name
_AREAS = {"soak": "stability.soak"}
# the check that is missing where another one cannot be reported
_IN_PLACE_OF = {("both", "preflight"): "preflight.loads", ("both", SOAK_LEFT_OUT): "stability.failures"}
_OPTIONAL = ("calibration",)  # reported, and holds no gate


def ends_the_run(error: BaseException) -> bool:
    """Whether `error` means that no further check can be carried out or stored, rather than that one check failed.

    True for an interrupt (also one that a library turned into an error of its own), a bad plan, and records or a disk
    that cannot be written.
    """
    if isinstance(error, BadInput):
        return True
    return any(
        isinstance(one, KeyboardInterrupt | SystemExit | SQLAlchemyError)
        or (isinstance(one, OSError) and one.errno in _FULL_DISK)
        for one in _chain(error)
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """`error`, what caused it, and what a group of errors holds."""
    left, seen = [error], set[int]()
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        left += [found for found in (one.__cause__, one.__context__) if found is not None]
        left += one.exceptions if isinstance(one, BaseExceptionGroup) else ()


def broken(
    arm: Literal["incumbent", "candidate", "both"], error: BaseException, *, secrets: Sequence[str] = ()
) -> dict[str, Any]:
    """The record of a check that `error` ended.

    A candidate that does not start, or dies, FAILs. Anything else is an ERROR: nothing was learned of the candidate.
    """
    fails = arm == "candidate" and isinstance(error, EngineError) and not isinstance(error, _ENVIRONMENT)
    log = list(error.log_tail[-LOG_LINES:]) if isinstance(error, EngineError) else []
    why, *log = (_without(text, secrets) for text in (summary(error), *log))
    return {"verdict": (Verdict.FAIL if fails else Verdict.ERROR).value, "why": why, "log": log}


def summary(error: BaseException) -> str:
    """What happened, on one line: an engine's error without the log lines behind it, another error with its name."""
    first = (str(error).splitlines() or [""])[0]
    if isinstance(error, SwitchyardError):
        return first.partition("; its last lines")[0] or type(error).__name__
    return f"{type(error).__name__}: {first}".rstrip(": ")


def _without(text: str, secrets: Sequence[str]) -> str:
    for secret in filter(None, secrets):
        text = text.replace(secret, "[redacted]")
    return text


def left_out(why: str, **detail: Any) -> dict[str, Any]:
    """The record of a check that was not attempted."""
    return {"verdict": Verdict.INCONCLUSIVE.value, "why": why, "log": [], **detail}


def can_be_retried(record: Mapping[str, Any]) -> bool:
    """Whether a resumed run repeats the check: a FAIL is a result, and stands."""
    return bool(record["verdict"] != Verdict.FAIL)


def models_to_retry(records: Records, run_id: str) -> frozenset[str]:
    """The models of a run of which a resumed run would measure more."""
    found = records.list_evidence(run_id, kind=KIND)
    failed = {row.model_id for row in found if not can_be_retried(row.payload)}
    return frozenset(row.model_id for row in found) - failed


def judge_unmeasured(arm: str, what: str, record: Mapping[str, Any]) -> CheckResult:
    """The verdict on one record, with the last lines of the engine's log."""
    lines = error_lines(record["log"])
    why = f"{record['why']}: {' | '.join(lines)}" if lines else str(record["why"])
    why = why if len(why) <= WHY_CHARS else f"{why[: WHY_CHARS - 4]} ..."
    verdict, required = Verdict(record["verdict"]), what not in _OPTIONAL
    if verdict is Verdict.PASS:
        raise BadInput(f"{what}: a check that was not carried out cannot pass")
    # `launch.candidate`, `parity.answers.incumbent`, `performance.measured`
    check = _IN_PLACE_OF.get((arm, what), f"{_AREAS.get(what, what)}.{'measured' if arm == 'both' else arm}")
    return CheckResult(check=check, verdict=verdict, why=why, required=required)


def error_lines(log: Sequence[str]) -> list[str]:
    """The last lines that mention an error, else the last ones; without their time stamps."""
    lines = [bare for line in log if (bare := _LOG_PREFIX.sub("", line).strip())]
    errors = [line for line in lines if _ERROR_WORDS.search(line)]
    return list(dict.fromkeys(errors or lines))[-SHOWN_LINES:]
