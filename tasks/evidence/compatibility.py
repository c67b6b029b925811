"""Whether the candidate's API behaves as a client of the incumbent needs it: measured as evidence, judged apart."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import httpx

from engines.errors import BadInput
from engines.settings import Endpoint
from engines.units import number_of
from tasks.evidence.behaviours.base import Asker, Behaviour, NotApplicable, Observation
from tasks.evidence.behaviours.battery import BEHAVIOURS, DEFAULT_REQUIRED
from tasks.evidence.behaviours.caller import READ_TIMEOUT_S, UNREADABLE, Malformed, Refused, unreadable
from tasks.verdicts.verdict import CheckResult, Verdict, gate, not_measured

Seen = Mapping[str, Any]
GIVE_UP_AFTER = 3
OBSERVED_CHARACTERS = 400
# what no client of a served model meets of the engine itself
ANSWERED_BY_THE_YARD = ("health_route", "metrics_route", "models_list", "props_route")
UNTRIED = Observation("errored", f"not tried: the {GIVE_UP_AFTER} behaviours before it got no answer")


def measure_compatibility(
    endpoint: Endpoint,
    *,
    names: Sequence[str] | None = None,
    read_timeout_s: float = READ_TIMEOUT_S,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """What each behaviour did at `endpoint`: `{"engine", "version", "behaviours": {name: {"outcome", ...}}}`.

    An outcome is passed, failed, not_applicable or errored (the connection broke, or `read_timeout_s` seconds
    brought no byte). After three errored in a row the rest is errored untried: the engine no longer answers.
    Raises BadInput for a name that is no behaviour. Keep the result as it is: judge_compatibility reads it.
    """
    chosen = list(BEHAVIOURS) if names is None else known(names, "names")
    seen: dict[str, dict[str, Any]] = {}
    unanswered = 0
    with Asker(endpoint, read_timeout_s=read_timeout_s) as ask:
        for name in chosen:
            started = time.monotonic()
            outcome = tried(BEHAVIOURS[name], ask) if unanswered < GIVE_UP_AFTER else UNTRIED
            unanswered = unanswered + 1 if outcome.outcome == "errored" else 0
            seen[name] = {
                "outcome": outcome.outcome,
                "observed": outcome.observed[:OBSERVED_CHARACTERS],
                "claim": BEHAVIOURS[name].claim,
                "group": BEHAVIOURS[name].group,
                "elapsed_ms": round((time.monotonic() - started) * 1000, 1),
            }
            progress(f"{endpoint.engine} {name}: {outcome.outcome} ({outcome.observed[:80]})")
    return {"engine": endpoint.engine, "version": endpoint.version, "behaviours": seen}


def tried(behaviour: Behaviour, ask: Asker) -> Observation:
    """What one behaviour observed; an error of its own becomes an outcome, so that the battery continues."""
    try:
        return behaviour.probe(ask)
    except NotApplicable as reason:
        return Observation("not_applicable", str(reason))
    except (Refused, Malformed) as reason:
        return Observation("failed", str(reason))
    except httpx.HTTPError as reason:
        return Observation("errored", f"{type(reason).__name__}: {reason}".rstrip(": "))
    except UNREADABLE as reason:
        return Observation("failed", unreadable(reason))


def known(names: Collection[str], where: str) -> list[str]:
    """`names`, in order; BadInput naming the first that is no behaviour, with the closest that are."""
    for name in names:
        if name not in BEHAVIOURS:
            close = difflib.get_close_matches(name, BEHAVIOURS, n=3, cutoff=0.4)
            hint = f"did you mean {', '.join(close)}?" if close else f"the names: {', '.join(BEHAVIOURS)}"
            raise BadInput(f"compatibility {where}: {name!r} is no behaviour; {hint}")
    return list(names)


def judge_compatibility(
    incumbent: Mapping[str, Any], candidate: Mapping[str, Any], required: Collection[str] = DEFAULT_REQUIRED
) -> list[CheckResult]:
    """One check per behaviour, "compatibility.<name>", and the share of the required ones that pass.

    Takes two results of measure_compatibility. A behaviour that the incumbent lacks as well is no regression: it
    passes, with a note, and so does one that the yard answers itself. One that applies to neither is listed without
    holding the gate. Raises BadInput for a required name that is no behaviour.
    """
    needed = frozenset(known(required, "required"))
    old, new = incumbent["behaviours"], candidate["behaviours"]
    names = [name for name in BEHAVIOURS if name in old or name in new or name in needed]
    checks = [judge_behaviour(name, old.get(name), new.get(name), required=name in needed) for name in names]
    return [*checks, required_passed(checks)]


def judge_behaviour(name: str, old: Seen | None, new: Seen | None, *, required: bool) -> CheckResult:
    """The verdict on one behaviour, from what the incumbent (`old`) and the candidate (`new`) did."""
    before, after = ("missing" if seen is None else seen["outcome"] for seen in (old, new))
    then, now = ("" if seen is None else str(seen["observed"]) for seen in (old, new))
    verdict, why = Verdict.INCONCLUSIVE, now
    if before == after == "not_applicable":
        why, required = f"not applicable: {now}", False
    elif after == "passed":
        verdict = Verdict.PASS
    elif after == "errored":
        verdict = Verdict.ERROR
    elif after == "missing":
        why = "not measured on the candidate"
    elif name in ANSWERED_BY_THE_YARD:
        verdict, why = Verdict.PASS, f"the yard answers it for its clients; the candidate: {now}"
    elif before == "passed":
        lost = "does not apply there" if after == "not_applicable" else "the candidate fails"
        verdict, why = Verdict.FAIL, f"the incumbent passes, {lost}: {now}"
    elif before in ("failed", "not_applicable"):
        lacks = "fails it too" if before == "failed" else "has no use of it"
        why = f"not a regression: the incumbent {lacks} ({then}); the candidate: {now}"
        verdict = Verdict.PASS
    else:
        reason = "errored there" if before == "errored" else "was not measured there"
        why = f"no incumbent to compare with: it {reason}; the candidate: {now}"
    return CheckResult(check=f"compatibility.{name}", verdict=verdict, why=why, required=required)


def required_passed(checks: Collection[CheckResult]) -> CheckResult:
    """The share of required checks that pass, limit 1; its verdict is the worst among them."""
    needed = [result for result in checks if result.required]
    if not needed:
        return not_measured("compatibility.required_passed", "no required behaviour applies", limit=1.0, unit="share")
    bad = [result.check.partition(".")[2] for result in needed if result.verdict is not Verdict.PASS]
    share = (len(needed) - len(bad)) / len(needed)
    why = f"{len(needed) - len(bad)} of {number_of(len(needed), 'required behaviour')} pass"
    why += f"; not: {', '.join(bad)}" if bad else ""
    check, verdict = "compatibility.required_passed", gate(needed)
    return CheckResult(check=check, verdict=verdict, value=share, limit=1.0, unit="share", why=why)
