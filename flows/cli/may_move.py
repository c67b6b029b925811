"""What the evidence says before a person moves a model, or a share of its traffic; and whether it is moved."""

import sys

from engines.home import home
from flows.cli.output import errors, finish, out, verdict_text
from flows.rollout.approval import yes_or_no
from flows.rollout.evidence import evidence_of_move
from tasks.evidence.parity.parameters import requests
from tasks.verdicts.verdict import Verdict

EXIT_NOT_MOVED = 3


def require_evidence(model: str | None, to: str | None, *, yes: bool, json_: bool) -> None:
    """Print what the evidence says of the move; where that is not PASS, ask, or end with exit code 3.

    A terminal is asked; without one it takes `yes`. The way back needs no evidence.
    """
    found = evidence_of_move(home(), model, to)
    if found is None:
        return
    move, known = found.what, found.known
    verdict = known.verdict or Verdict.INCONCLUSIVE
    errors.print("evidence on ", move, ": ", verdict_text(verdict), sep="", end="")
    errors.print(f": {known.why}", markup=False)
    if found.ignored:
        errors.print(f"clients send fields that the target does not act on: {requests(found.ignored)}", markup=False)
    is_asked = sys.stdin.isatty() and sys.stderr.isatty()
    if not (known.open or yes or (is_asked and yes_or_no(f"Move {move} all the same?", errors))):
        advice = "`switchyard evaluate` first, or add --yes to move it all the same"
        why = f"nothing was moved: the evidence on {move} is not PASS; {advice}"
        refused = {"done": None, "verdict": verdict.value, "evidence": known.why, "why": why}
        finish(refused, json_, lambda _: out.print(why, markup=False), EXIT_NOT_MOVED)
