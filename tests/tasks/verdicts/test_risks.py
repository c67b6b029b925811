"""The gate and the risk register: PASS alone opens, and every risk shows what it was judged by."""

from __future__ import annotations

import pytest

from migrations.llama_cpp_to_mistral_rs import PAIR
from tasks.verdicts.risks import Risk, judge_risks
from tasks.verdicts.verdict import CheckResult, Verdict, gate, reasons

P, I, E, F = Verdict.PASS, Verdict.INCONCLUSIVE, Verdict.ERROR, Verdict.FAIL  # noqa: E741

CHECKS = {
    "compatibility.tool_calls": "mistral.rs misses features",
    "parity.ignored_parameters": "mistral.rs misses features",
    "performance.ttft_p50_ratio": "performance regression",
    "performance.errors": "performance regression",
    "memory.peak_ratio": "performance regression",
    "memory.leak_bytes_per_day": "performance regression",
    "preflight.architecture": "model compatibility",
    "parity.prompt_tokens": "model compatibility",
    "stability.failures": "native SDK bugs",
    "stability.silent_empty": "native SDK bugs",
    "faults.sigkill": "native SDK bugs",
}


def result(check: str, verdict: Verdict = P, *, required: bool = True) -> CheckResult:
    """A check with nothing but a verdict."""
    return CheckResult(check=check, verdict=verdict, why="because", required=required)


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [([], I), ([P], P), ([P, P, I], I), ([I, E], E), ([P, F, E, I], F)],
)
def test_the_worst_check_is_the_gates_verdict(verdicts: list[Verdict], expected: Verdict) -> None:
    """Nothing measured is INCONCLUSIVE."""
    assert gate([result(f"c.{i}", verdict) for i, verdict in enumerate(verdicts)]) is expected


def test_only_required_checks_hold_the_gate() -> None:
    """And where there are only optional ones, nothing was proven."""
    assert gate([result("a", P), result("b", F, required=False)]) is P
    assert gate([result("b", P, required=False)]) is I


@pytest.mark.parametrize(("check", "risk"), list(CHECKS.items()))
def test_a_failed_check_falls_on_its_risk(check: str, risk: str) -> None:
    """The other risks keep their verdict."""
    results = [result(name, F if name == check else P) for name in CHECKS]
    judged = {line.risk.risk: line for line in judge_risks(PAIR.risks, results)}
    assert judged[risk].verdict is F
    assert [decided.check for decided in judged[risk].decided_by] == [check]
    # an ignored parameter is evidence about the model as well: it changes what it answers
    elsewhere = {name for name, line in judged.items() if line.verdict is F} - {risk}
    assert elsewhere == ({"model compatibility"} if check == "parity.ignored_parameters" else set())


def test_every_risk_of_the_register_is_shown_even_without_evidence() -> None:
    """Not measured is INCONCLUSIVE, never PASS."""
    judged = judge_risks(PAIR.risks, [])
    assert [line.risk for line in judged] == list(PAIR.risks)
    assert {line.verdict for line in judged} == {I}
    assert all(line.decided_by == () for line in judged)


def test_a_risk_that_passed_was_decided_by_all_its_checks() -> None:
    """So no single one is named."""
    judged = {line.risk.risk: line for line in judge_risks(PAIR.risks, [result(name) for name in CHECKS])}
    assert {line.verdict for line in judged.values()} == {P}
    assert all(line.decided_by == () for line in judged.values())


def test_a_risk_is_decided_by_its_worst_required_checks() -> None:
    """All of them, and none that is merely reported."""
    risk = Risk(risk="slow", likelihood="low", impact="low", mitigation="measure", evidence=("performance.*",))
    results = [
        result("performance.a", F),
        result("performance.b", I),
        result("performance.c", F),
        result("performance.d", F, required=False),
        result("parity.a", F),
    ]
    (judged,) = judge_risks([risk], results)
    assert judged.verdict is F
    assert [decided.check for decided in judged.decided_by] == ["performance.a", "performance.c"]


def test_reasons_are_the_checks_that_keep_it_shut_worst_first() -> None:
    """In their order where equally bad."""
    results = [
        result("a", I),
        result("b", F),
        result("c", P),
        result("d", E),
        result("e", F),
        result("f", F, required=False),
    ]
    assert [reason.check for reason in reasons(results)] == ["b", "e", "d", "a"]
    assert reasons([result("a")]) == []


def test_a_risk_says_what_of_it_was_not_measured() -> None:
    """A register that calls this a pass would be believed; an engine that starts has no check of its own."""
    register = {line.risk.risk: line for line in judge_risks(PAIR.risks, [result("stability.failures")])}
    half = register["native SDK bugs"]
    assert (half.verdict, half.unmeasured) == (I, ("faults",))
    assert register["model compatibility"].unmeasured == ("preflight", "parity")
    skipped = [result(name, I) if name.startswith("perf") else result(name) for name in CHECKS]
    (line,) = [line for line in judge_risks(PAIR.risks, skipped) if line.risk.risk == "performance regression"]
    assert (line.verdict, line.unmeasured) == (I, ("performance",))
    assert all(not line.unmeasured for line in judge_risks(PAIR.risks, [result(name, F) for name in CHECKS]))
