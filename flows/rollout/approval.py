"""A person's approval: asked for on the terminal, or by a form in the Prefect UI while the run is suspended.

A question names what would happen and shows the verdicts it rests on. Nobody's answer changes nothing: the model stays
where it is.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from rich.console import Console
from rich.prompt import InvalidResponse, Prompt, PromptBase
from rich.text import Text

from engines.units import number_of
from tasks.verdicts.verdict import CheckResult, Verdict, reasons

# runs that wait since an older version are answered in its words
Answer = Annotated[
    Literal["no", "yes"], BeforeValidator(lambda word: {"stay": "no", "go on": "yes"}.get(str(word), word))
]


@dataclass(frozen=True)
class Question:
    """May this phase begin for this model? `verdict` and `checks` are what is known.

    `costs` measures what else to know, one line each, once the question is shown to someone.
    """

    phase: str
    model: str
    what: str  # what would happen, as a sentence
    verdict: Verdict
    checks: Sequence[CheckResult] = ()
    report: str | None = None
    wait_s: float = 72 * 3600.0
    costs: Callable[[], Sequence[str]] = tuple

    @property
    def key(self) -> str:
        """Its name in Prefect: lower case, digits and dashes, another one for another model."""
        digest = hashlib.sha256(self.model.encode()).hexdigest()[:8]
        return re.sub(r"[^a-z0-9]+", "-", f"{self.phase}-{self.model}".lower()).strip("-")[:60] + f"-{digest}"

    def findings(self) -> list[tuple[Verdict, str]]:
        """What is open, worst first; then a line for each area that passed."""
        shut = reasons(self.checks)
        areas = Counter(check.check.partition(".")[0] for check in self.checks if check.required)
        closed = {check.check.partition(".")[0] for check in shut}
        lines = [(check.verdict, f"{check.check}: {' '.join(check.why.split())}") for check in shut]
        passed = [(area, n) for area, n in areas.items() if area not in closed]
        return lines + [(Verdict.PASS, f"{area}: {n} of {number_of(n, 'required check')}") for area, n in passed]

    def markdown(self) -> str:
        """The question behind its verdicts, as the form shows it: a narrow box, which would cut a table."""
        lines = [f"**{self.model}: {self.verdict}**", ""]
        lines += [f"- **{verdict}** {what[:300]}" for verdict, what in self.findings()]
        lines += [f"- {cost}" for cost in self.costs()]
        if self.report:
            lines += ["", f"Report: `{self.report}`"]
        lines += ["", "Unanswered, everything stays as it is. Name and reason are recorded.", "", f"## {self.what}?"]
        return "\n".join(lines)


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
    out, costs = Console(stderr=True), question.costs()
    out.print(f"\n{question.model}: {question.verdict}", highlight=False)
    for verdict, what in question.findings():
        out.print(f"  {verdict:<12} {what}", highlight=False, markup=False, soft_wrap=True)
    for cost in costs:
        out.print(f"  {'':<12} {cost}", highlight=False, markup=False, soft_wrap=True)
    if question.report:
        out.print(f"  report: {question.report}", highlight=False, markup=False, soft_wrap=True)
    if not yes_or_no(f"{question.what}?", out):
        return Approval(False, "", "")
    who = _filled("Your name", out)
    return Approval(True, who, _filled("Why", out))


class _YesOrNo(PromptBase[bool]):
    response_type = bool
    choices = ["yes", "no"]  # noqa: RUF012
    validate_error_message = "[prompt.invalid]Answer yes or no"

    def process_response(self, value: str) -> bool:
        """The answer; `y` and `n` will do."""
        word = value.strip().lower()
        if not word or word not in ("yes", "y", "no", "n"):
            raise InvalidResponse(self.validate_error_message)
        return word.startswith("y")

    def render_default(self, default: Any) -> Text:
        """What an empty line means."""
        return Text("(yes)" if default else "(no)", "prompt.default")


def yes_or_no(question: str, out: Console) -> bool:
    """The answer to a question on the terminal; an empty line, or the end of the input, is a no."""
    try:
        return bool(_YesOrNo.ask(question, default=False, console=out))
    except EOFError:
        return False


def in_advance(who: str, reason: str) -> Asks:
    """One who has said yes to everything beforehand, by name and with a reason."""
    return lambda _: Approval(True, who, reason)


def in_prefect(question: Question) -> Approval | None:
    """A form in the UI. The run is suspended: its process ends, and the flow is run again once it is answered."""
    # here, not above: the terminal asks without Prefect's start
    from prefect.flow_runs import suspend_flow_run
    from prefect.input import RunInput

    class ApprovalForm(RunInput):
        """Yes or no, by name and with a reason."""

        # "no" where nothing was chosen; the name is never filled in beforehand
        model_config = ConfigDict(title="Approval")
        decision: Answer = Field("no", description="yes: the phase begins; no: nothing moves")
        who: str = Field(min_length=2, max_length=100, description="your name; it is recorded")
        reason: str = Field(min_length=2, max_length=500, description="why; it is recorded")

    given = suspend_flow_run(
        wait_for_input=ApprovalForm.with_initial_data(description=question.markdown()),
        timeout=int(question.wait_s),
        key=question.key,
    )
    return Approval(given.decision == "yes", given.who.strip(), given.reason.strip())


asks: ContextVar[Asks] = ContextVar("asks", default=nobody)


def _filled(prompt: str, out: Console) -> str:
    while not (given := Prompt.ask(prompt, console=out).strip()):
        pass
    return given
