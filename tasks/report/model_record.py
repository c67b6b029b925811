"""What the records hold of one model: its verdicts, its evidence, and what to do next."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from engines.units import number_of
from tasks.evidence.first_look import whole_or_first
from tasks.evidence.parity.compare import compare_answers
from tasks.evidence.performance import with_mapped
from tasks.evidence.quants import another_quant
from tasks.records.series import Series
from tasks.records.store import Records
from tasks.records.tables import Arm, Evidence, Run
from tasks.report.plots import ARMS
from tasks.verdicts.verdict import LEFT_TO_WHOLE, CheckResult, Verdict, is_near, reasons

WHY_CHARS = 220
SAYS = {Verdict.FAIL: "failed", Verdict.ERROR: "could not be carried out", Verdict.INCONCLUSIVE: "unproven"}
# by the worst check: what would change the verdict
NEXT_STEPS = {
    "launch.candidate": "Keep the incumbent, or choose a GGUF that the candidate loads; its last output is below.",
    "launch.incumbent": "Fix what keeps the incumbent from starting (its last output is below), then resume the run.",
    "preflight": "Keep the incumbent, or choose a GGUF that the candidate loads and this machine holds.",
    "parity.prompt_tokens": "Keep the incumbent: the candidate reads other tokens. A tokenizer.json named in the plan, "
    "or a newer candidate, may fix it; then evaluate again.",
    "parity.trigger_similarity": "Keep the incumbent: the candidate calls tools on other prompts; read which below.",
    "parity.schema_accuracy": "Keep the incumbent: the candidate's calls break their schemas. Read the faults below.",
    "parity": "Read the answers that differ below. Keep the incumbent unless you can explain them.",
    "compatibility": "Keep the incumbent while your client needs what is missing; name in client.requires what it does "
    "use, and evaluate again.",
    "performance.errors": "Keep the incumbent; the candidate's log says why its requests failed.",
    "performance": "Keep the incumbent, or tune the candidate and evaluate again.",
    "memory": "Give the candidate more memory or a smaller context, and evaluate again.",
    "stability": "Keep the incumbent; look at the failures below and in the candidate's log.",
    "faults": "Keep the incumbent until the candidate's faults are noticed, and recovered from, in time.",
}
UNPROVEN = {
    "performance": "Plan more blocks (measure.looks) or quiet the machine, and evaluate again.",
    "memory": "Plan more blocks or a longer soak, and evaluate again.",
    "parity.trigger_similarity": "Plan more prompts with tools (measure.tool_prompts), and evaluate again.",
    "parity.schema_accuracy": "Plan more prompts with tools (measure.tool_prompts), and evaluate again.",
    "parity": "Plan more prompts (measure.parity_prompts), and evaluate again.",
    "stability": "Soak for longer (measure.soak_s), and evaluate again.",
}


@dataclass(frozen=True)
class ModelRecord:
    """The verdicts on one model and all that the records hold of it."""

    name: str
    verdict: str
    checks: tuple[CheckResult, ...]
    risks: tuple[Mapping[str, Any], ...]
    evidence: Mapping[tuple[str, str], Sequence[Evidence]]
    memory: Mapping[str, Series]
    plan: Mapping[str, Any]

    @classmethod
    def read(cls, records: Records, run: Run, outcome: Mapping[str, Any]) -> Self:
        """The record of the model that `outcome` (one of its "models") is about."""
        name = str(outcome["model"])
        evidence: dict[tuple[str, str], list[Evidence]] = {}
        for found in records.list_evidence(run.id, model_id=name):
            evidence.setdefault((found.arm, found.kind), []).append(found)
        arms: tuple[Arm, Arm] = ("incumbent", "candidate")
        memory = {arm: records.read_samples(run.id, name, arm, "memory_bytes") for arm in arms}
        return cls(
            name=name,
            verdict=str(outcome.get("verdict", "INCONCLUSIVE")),
            checks=tuple(CheckResult.model_validate(check) for check in outcome.get("checks", [])),
            risks=tuple(outcome.get("risks", [])),
            evidence=evidence,
            memory={arm: series for arm, series in memory.items() if len(series)},
            plan=run.plan if isinstance(run.plan, Mapping) else {},
        )

    @property
    def anchor(self) -> str:
        """The name as an identifier of HTML."""
        return "model-" + re.sub(r"[^A-Za-z0-9_-]", "-", self.name)

    @cached_property
    def engines(self) -> dict[str, Mapping[str, Any]]:
        """By arm: engine, version, form, argv and what it does not support, as they stood beside the last evidence."""
        seen: dict[str, Mapping[str, Any]] = {}
        for (arm, _), found in self.evidence.items():
            for engine in (found[-1].environment or {}).get("engines", []):
                seen[str(engine.get("arm", arm))] = {"argv": [], "unsupported": [], **engine}
        return {arm: seen[arm] for arm in ARMS if arm in seen}

    @property
    def names(self) -> dict[str, str]:
        """By arm: the engine's name, for legends."""
        return {arm: str(self.engines.get(arm, {}).get("engine", "")) for arm in ARMS}

    @property
    def digest(self) -> str | None:
        """The digest of the model file that was measured."""
        found = (rows[-1].environment or {} for rows in self.evidence.values())
        return next((row["model_digest"] for row in found if row.get("model_digest")), None)

    @property
    def gguf(self) -> str | None:
        """The model file, by the plan."""
        models = self.plan.get("models") or []
        return next((str(model["gguf"]) for model in models if model.get("id") == self.name and "gguf" in model), None)

    def one(self, arm: str, kind: str) -> Any:
        """The payload of one kind of evidence, or None."""
        found = self.evidence.get((arm, kind))
        return found[-1].payload if found else None

    def all(self, arm: str, kind: str) -> list[Any]:
        """Every payload of one kind, in the order of their keys."""
        if (arm, kind) not in self._unpacked:
            rows = sorted(self.evidence.get((arm, kind), []), key=lambda found: found.key)
            self._unpacked[arm, kind] = [found.payload for found in rows]
        return self._unpacked[arm, kind]

    @cached_property
    def _unpacked(self) -> dict[tuple[str, str], list[Any]]:
        return {}

    def blocks(self, kind: str = "performance") -> list[Any]:
        """The blocks of a kind, discarded ones among them."""
        return with_mapped(self.all("both", kind))

    def parity(self, kind: str) -> list[Any]:
        """Both engines' evidence of a kind, or that of the first look; None of an engine that was not asked."""
        return whole_or_first(self.one, kind)

    @cached_property
    def comparison(self) -> Mapping[str, Any] | None:
        """Both engines' answers compared, as the verdict was reached; None where one was not asked."""
        ours, theirs = self.parity("answers")
        return compare_answers(ours, theirs, tie_gap_nats=self.tie_gap) if ours and theirs else None

    @property
    def tie_gap(self) -> float:
        """Nats under which a divergence is a near tie, by the plan."""
        return float((self.plan.get("limits") or {}).get("tie_gap_nats", 0.5))

    def check(self, name: str) -> CheckResult | None:
        """The result of one check."""
        return next((result for result in self.checks if result.check == name), None)

    @cached_property
    def closed_by(self) -> list[CheckResult]:
        """The required checks that did not pass, worst first."""
        return reasons(self.checks)

    @property
    def counts(self) -> str:
        """One sentence: how many required checks say what, and in which areas."""
        required = [result for result in self.checks if result.required]
        if not required:
            return "No required check was measured."
        if not self.closed_by:
            return f"All {number_of(len(required), 'required check')} passed."
        counts = ", ".join(
            f"{len(found)} {word} ({', '.join(by_area(found))})"
            for verdict, word in SAYS.items()
            if (found := [result for result in required if result.verdict is verdict])
        )
        return f"{counts} of {number_of(len(required), 'required check')}."

    @property
    def why(self) -> str:
        """The counts, and the words of the worst check."""
        worst = f" Worst: {self.closed_by[0].check}: {shortened(self.closed_by[0].why)}" if self.closed_by else ""
        return self.counts + worst

    @property
    def next_step(self) -> str:
        """What the user does now."""
        if not self.closed_by:
            return "This model may move. Keep this report as the evidence." if self.checks else "Evaluate it."
        worst = self.closed_by[0]
        if worst.why.endswith(LEFT_TO_WHOLE):
            return "Nothing failed in the first look: evaluate it without --quick."
        steps = UNPROVEN if worst.verdict is Verdict.INCONCLUSIVE else NEXT_STEPS
        fallback = "Read below what was not measured, fix it, then evaluate again."
        step = next((words for prefix, words in steps.items() if worst.check.startswith(prefix)), fallback)
        over = [r for r in self.closed_by if r.verdict is Verdict.FAIL]
        # a limit is a judgement: a little more may do, what is far beyond it is no matter of the limit
        if over and all(r.unit == "ratio" and r.value and r.limit and is_near(r.value, r.limit) for r in over):
            step += " Or accept a limit a little larger in the plan, with your reason."
        return f"{step} {self.another_quant or ''}".strip()

    @property
    def another_quant(self) -> str | None:
        """Whether another quant of the model may turn a verdict on speed, and how to try it."""
        report, limits = self.one("both", "preflight"), self.plan.get("limits") or {}
        return another_quant(self.checks, report, limits, self.gguf or "MODEL") if report else None

    @property
    def slow(self) -> list[str]:
        """The weights that an engine of this model computes slowly, one line each."""
        report = self.one("both", "preflight") or {"engines": []}
        return [
            f"{one['engine']}, {slow['device']}: {slow['why']} ({slow['source']})"
            for one in report["engines"]
            for slow in one.get("slow", ())
        ]


def decided_by(risk: Mapping[str, Any]) -> str:
    """The checks that decided a risk, and what of it was not measured."""
    missing = ", ".join(risk.get("not_measured", ()))
    parts = [", ".join(risk["decided_by"]), f"not measured: {missing}" if missing else ""]
    return "; ".join(filter(None, parts)) or "every check on it passed"


def shortened(text: str, limit: int = WHY_CHARS) -> str:
    return text if len(text) <= limit else text[: limit - 1].rsplit(" ", 1)[0] + " …"


def by_area(results: Iterable[CheckResult]) -> dict[str, list[CheckResult]]:
    """The results by the first word of the check's name, in the order in which they begin."""
    grouped: dict[str, list[CheckResult]] = {}
    for result in results:
        grouped.setdefault(result.check.split(".")[0], []).append(result)
    return grouped
