"""Tool calls in two numbers: does the candidate call when the incumbent does, and are its arguments valid?

Trigger similarity is the F1 of "called a tool" with the incumbent's answers as the truth: 2 TP / (2 TP + FP + FN). Of
the prompts on which either engine calls, J = TP / (TP + FP + FN) are called by both, a proportion with a Wilson
interval; F1 = 2 J / (1 + J) rises with J, so its interval is that of J, mapped. Schema accuracy is the share of answers
with calls whose calls all name an offered tool with arguments valid under its schema. Both limits are shares of what
the incumbent itself reaches: against its own repeat, and under its own schemas.

Looked at after thirds of the prompts, with the O'Brien-Fleming bound of the look as the interval's confidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engines.units import number_of, quantity
from tasks.evidence.parity.asking import Evidence, by_id
from tasks.evidence.tool_calls.prompts import NEEDED
from tasks.verdicts.limits import Limits
from tasks.verdicts.noninferiority import look_bounds
from tasks.verdicts.statistics import normal_cdf, wilson
from tasks.verdicts.verdict import CheckResult, Verdict, decided, not_measured

TRIGGER, SCHEMA = "parity.trigger_similarity", "parity.schema_accuracy"
KIND = "parity.tool_calls"  # of the evidence; its key is the batch
SHOWN_DIFFERENCES = 20
Answers = Sequence[Evidence]


@dataclass(frozen=True)
class Counts:
    """How the answers of both engines to the same prompts agree on calling a tool."""

    asked: int
    both: int
    incumbent_only: int
    candidate_only: int

    @property
    def either(self) -> int:
        """The prompts on which at least one engine called a tool."""
        return self.both + self.incumbent_only + self.candidate_only

    @property
    def f1(self) -> float | None:
        """F1 of "called a tool"; None where neither called one."""
        return _f1(self.both / self.either) if self.either else None


def batches_of(ours: Sequence[Evidence], theirs: Sequence[Evidence]) -> list[Evidence]:
    """Both engines' evidence put together, of each `batch` that both have; without the candidate where it is `hidden`.

    `looks` is the schedule, `hidden` why no tool reaches the incumbent's model, `required` whether a call was demanded.
    """
    answers = {one["batch"]: one["answers"] for one in theirs}
    both = [one for one in ours if one["hidden"] or one["batch"] in answers]
    return [one | {"incumbent": one["answers"], "candidate": answers.get(one["batch"], [])} for one in both]


def judge_tool_calls(batches: Sequence[Evidence], limits: Limits) -> list[CheckResult]:
    """`parity.trigger_similarity` and `parity.schema_accuracy`; nothing where there are no batches.

    Nothing called by the incumbent is INCONCLUSIVE and holds no gate, and so is what so few calls could not prove even
    if all of them agreed.
    """
    if hidden := next((batch["hidden"] for batch in batches if batch["hidden"]), None):
        why = f"the incumbent is given no tools to call: {hidden}"
        return [not_measured(check, why, required=False) for check in (TRIGGER, SCHEMA)]
    free = [batch for batch in batches if not batch["required"]]
    if not free:
        return []
    looks = tuple(free[0]["looks"])
    z = look_bounds(looks)[min(len(free), len(looks)) - 1]
    ours, theirs, again = (_joined(free, key) for key in ("incumbent", "candidate", "again"))
    forced = [_joined([batch for batch in batches if batch["required"]], arm) for arm in ("incumbent", "candidate")]
    return [
        _judge_trigger(ours, theirs, again, limits.trigger_similarity, z),
        _judge_schema(ours, theirs, forced, limits.schema_accuracy, z),
    ]


def calls_settled(batches: Sequence[Evidence], limits: Limits) -> bool:
    """Whether more prompts would change nothing: one number has failed, or none is left open by the calls there are."""
    results = judge_tool_calls([batch for batch in batches if not batch["required"]], limits)
    is_open = [result.verdict is Verdict.INCONCLUSIVE and result.value is not None for result in results]
    return not any(is_open) or any(result.verdict is Verdict.FAIL for result in results)


def count_calls(ours: Answers, theirs: Answers) -> Counts:
    """Both engines' answers by prompt; one without an answer, or cut while a model thought, is left out."""
    pairs = _pairs(ours, theirs)
    called = [(bool(one["calls"]), bool(other["calls"])) for one, other in pairs]
    return Counts(len(pairs), called.count((True, True)), called.count((True, False)), called.count((False, True)))


def count_valid(answers: Answers) -> tuple[int, int]:
    """(answers whose calls are all valid, answers with calls) of those that are whole and whose schemas can be read."""
    faults = [[call["fault"] for call in one["calls"]] for one in answers if one["calls"] and not one["cut"]]
    judged = [one for one in faults if None not in one]
    return sum(not any(one) for one in judged), len(judged)


def tool_call_rows(batches: Sequence[Evidence]) -> list[dict[str, Any]]:
    """The table of a report: counts over all prompts, and by what a prompt needs."""
    free = [batch for batch in batches if not batch["hidden"] and not batch["required"]]
    ours, theirs = (_joined(free, arm) for arm in ("incumbent", "candidate"))
    rows = []
    for name, words in {"": "all", **NEEDED}.items():
        of_group = [[one for one in answers if name in ("", one["group"])] for answers in (ours, theirs)]
        counts = count_calls(*of_group)
        if counts.asked:
            rows.append({"prompts": words, "counts": counts, "valid": [count_valid(one) for one in of_group]})
    return rows


def tool_call_differences(batches: Sequence[Evidence]) -> list[tuple[str, str, str, str]]:
    """(id, end of the prompt, the incumbent's answer, the candidate's) where one called, or was valid, and one not."""
    free = [batch for batch in batches if not batch["hidden"] and not batch["required"]]
    pairs = _pairs(*(_joined(free, arm) for arm in ("incumbent", "candidate")))
    unlike = [pair for pair in pairs if _kind(pair[0]) != _kind(pair[1])]
    return [(one["id"], one["prompt"], _said(one), _said(other)) for one, other in unlike[:SHOWN_DIFFERENCES]]


def _judge_trigger(ours: Answers, theirs: Answers, again: Answers, share: float, z: float) -> CheckResult:
    counts, own = count_calls(ours, theirs), count_calls(ours, again).f1
    limit = share * (1.0 if own is None else own)
    if not counts.both + counts.incumbent_only:
        n = counts.candidate_only
        why = f"0 calls by {'both engines' if not n else f'the incumbent, {n} by the candidate'}"
        why += f" on {number_of(counts.asked, 'prompt')} with tools: nothing to compare"
        return not_measured(TRIGGER, f"{why}{_notes(ours, theirs)}", limit=share, unit="F1", required=False)
    low, high = (_f1(end) for end in _interval(counts.both, counts.either, z))
    most = _f1(_interval(counts.either, counts.either, z)[0])
    why = (
        f"{number_of(counts.asked, 'prompt')}: both call a tool on {counts.both}, the incumbent alone on "
        f"{counts.incumbent_only}, the candidate alone on {counts.candidate_only}; F1 {counts.f1:.3f}, "
        f"95% bounds {low:.3f} and {high:.3f}"
    )
    why += "" if own is None else f"; the incumbent against itself {own:.3f}"
    return _judged(TRIGGER, "F1", counts.f1, (low, high), limit, most, f"{why}{_notes(ours, theirs)}")


def _judge_schema(ours: Answers, theirs: Answers, forced: Sequence[Answers], share: float, z: float) -> CheckResult:
    by_itself = any(one["calls"] for one in (*ours, *theirs))
    arms = (ours, theirs) if by_itself else forced
    (valid, n), (valid_theirs, n_theirs) = map(count_valid, arms)
    asked = "" if by_itself else f"with tool_choice required, {number_of(len(arms[1]), 'prompt')}: "
    if not n or not n_theirs:
        why = f"{asked}{number_of(n, 'answer')} with calls by the incumbent, {n_theirs} by the candidate: "
        why += "nothing to compare"
        return not_measured(SCHEMA, why, limit=share, unit="share", required=False)
    limit = share * valid / n
    low, high = _interval(valid_theirs, n_theirs, z)
    most = _interval(n_theirs, n_theirs, z)[0]
    why = f"{asked}calls valid under their schemas in {valid_theirs} of the candidate's "
    why += f"{number_of(n_theirs, 'answer')} with calls, 95% bounds {low:.1%} and {high:.1%}; "
    why += f"in {valid} of the incumbent's {n}"
    if fault := next(filter(None, (call["fault"] for one in arms[1] for call in one["calls"])), ""):
        why += f"; such as {fault}"
    found = _judged(SCHEMA, "share", valid_theirs / n_theirs, (low, high), limit, most, why)
    return found if by_itself else found.model_copy(update={"required": False})


def _judged(
    check: str, unit: str, value: float | None, ends: tuple[float, float], limit: float, most: float, why: str
) -> CheckResult:
    """PASS where the lower end reaches the limit, FAIL where the upper is under it; `most` is the best lower end."""
    low, high = ends
    verdict = decided(fails=high < limit, passes=low >= limit)
    is_open, enough = verdict is Verdict.INCONCLUSIVE, most >= limit
    why += f"; limit {quantity(limit, unit)}"
    if is_open:
        why += ": more prompts would settle it (measure.tool_prompts)" if enough else ": too few calls to reach it"
    required = enough or not is_open
    return CheckResult(check=check, verdict=verdict, value=value, limit=limit, unit=unit, why=why, required=required)


def _notes(ours: Answers, theirs: Answers) -> str:
    """What else there is to know of the answers: calls left as text, thoughts without an end, errors."""
    notes = []
    for arm, answers in (("incumbent", ours), ("candidate", theirs)):
        leaked, unended = sum(one["leaked"] for one in answers), sum(_is_open(one) for one in answers)
        errors = [one["error"] for one in answers if one["error"]]
        notes += [f"{number_of(leaked, 'call')} of the {arm} stayed text"] if leaked else []
        notes += [f"{number_of(unended, 'answer')} of the {arm} did not end within their tokens"] if unended else []
        notes += [f"{number_of(len(errors), 'prompt')} failed on the {arm} ({errors[0][:80]})"] if errors else []
    return "".join(f"; {note}" for note in notes)


def _joined(batches: Sequence[Evidence], key: str) -> list[Evidence]:
    return [answer for batch in batches for answer in batch.get(key) or ()]


def _pairs(ours: Answers, theirs: Answers) -> list[tuple[Evidence, Evidence]]:
    others = by_id(theirs)
    pairs = [(one, others[name]) for name, one in by_id(ours).items() if name in others]
    return [(one, other) for one, other in pairs if not (one["error"] or _is_open(one) or _is_open(other))]


def _is_open(answer: Evidence) -> bool:
    """Cut before it called or wrote anything: whether it would have called is unknown."""
    return bool(answer["cut"]) and not answer["calls"]


def _kind(answer: Evidence) -> tuple[bool, bool]:
    return bool(answer["calls"]), any(call["fault"] for call in answer["calls"])


def _said(answer: Evidence) -> str:
    calls = [f"{call['name']}({call['arguments']})" for call in answer["calls"]]
    faults = [f"not valid: {call['fault']}" for call in answer["calls"] if call["fault"]]
    return "\n".join([*calls, *faults, answer["text"], answer["error"] or ""]).strip()


def _interval(hits: int, trials: int, z: float) -> tuple[float, float]:
    return wilson(hits, trials, 2.0 * normal_cdf(z) - 1.0)


def _f1(jaccard: float) -> float:
    return 2.0 * jaccard / (1.0 + jaccard)
