"""A person's approval: asked for on the terminal, or by a form in the Prefect UI while the run is suspended.

A question names what would happen and shows the verdicts it rests on. Nobody's answer changes nothing: the model stays
where it is.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict, Field
from rich.console import Console
from rich.prompt import Confirm, Prompt

from tasks.verdicts.verdict import CheckResult, Verdict


@dataclass(frozen=True)
class Question:
    """May this phase begin for this model? `verdict` and `checks` are what is known."""

    phase: str
    model: str
    what: str  # what would happen, as a sentence
    verdict: Verdict
    checks: Sequence[CheckResult] = ()
    report: str | None = None
    wait_s: float = 72 * 3600.0

    @property
    def key(self) -> str:
        """Its name in Prefect: lower case, digits and dashes, another one for another model."""
        digest = hashlib.sha256(self.model.encode()).hexdigest()[:8]
        return re.sub(r"[^a-z0-9]+", "-", f"{self.phase}-{self.model}".lower()).strip("-")[:60] + f"-{digest}"

    def markdown(self) -> str:
        """The question with its verdicts, as the form shows it: a narrow box, which would cut a table."""
        lines = [f"## {self.what}?", "", f"**{self.model}: {self.verdict}**", ""]
        lines += [f"- **{check.verdict}** {check.check}: {' '.join(check.why.split())[:300]}" for check in self.checks]
        if self.report:
            lines += ["", f"Report: `{self.report}`"]
        return "\n".join([*lines, "", "Unanswered, everything stays as it is. Name and reason are recorded."])


@dataclass(frozen=True)
class Approval:
    """Proceed or stay, who said so, and why."""

    approved: bool
    who: str
    reason: str


Asks = Callable[[Question], Approval | None]  # None when nobody is there to answer


def nobody(_: Question) -> Approval | None:
    """The answer of a program without a person in front of it."""
    return None


def on_terminal(question: Question) -> Approval | None:
    """Asked on standard error; None where that is no terminal."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None
    out = Console(stderr=True)
    out.print(f"\n[bold]{question.what}?[/bold]", highlight=False)
    out.print(f"{question.model}: {question.verdict}", highlight=False)
    for check in question.checks:
        out.print(f"  {check.verdict:<12} {check.check}: {check.why}", highlight=False, markup=False, soft_wrap=True)
    if not Confirm.ask("Proceed", default=False, console=out):
        return Approval(False, "", "")
    who = _filled("Your name", out)
    return Approval(True, who, _filled("Why", out))


def in_advance(who: str, reason: str) -> Asks:
    """One who has said yes to everything beforehand, by name and with a reason."""
    return lambda _: Approval(True, who, reason)


def in_prefect(question: Question) -> Approval | None:
    """A form in the UI. The run is suspended: its process ends, and the flow is run again once it is answered."""
    # here, not above: the terminal asks without Prefect's start
    from prefect.flow_runs import suspend_flow_run
    from prefect.input import RunInput

    class ApprovalForm(RunInput):
        """Proceed, or stay as it is."""

        # "stay" where nothing was chosen; "go on" is stored by runs that wait; the name is never filled in beforehand
        model_config = ConfigDict(title="Approval")
        decision: Literal["stay", "go on"] = Field("stay", description="stay: nothing moves; go on: the phase begins")
        who: str = Field(min_length=2, max_length=100, description="your name; it is recorded")
        reason: str = Field(min_length=2, max_length=500, description="why; it is recorded")

    given = suspend_flow_run(
        wait_for_input=ApprovalForm.with_initial_data(description=question.markdown()),
        timeout=int(question.wait_s),
        key=question.key,
    )
    return Approval(given.decision == "go on", given.who.strip(), given.reason.strip())


asks: ContextVar[Asks] = ContextVar("asks", default=nobody)


def _filled(prompt: str, out: Console) -> str:
    while not (given := Prompt.ask(prompt, console=out).strip()):
        pass
    return given
