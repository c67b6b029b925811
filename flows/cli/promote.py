import sys
from typing import Annotated

import typer

from engines.home import home
from flows.cli.options import Json, Model, Placement, To
from flows.cli.order import order
from flows.cli.output import errors, finish, out, verdict_text
from flows.rollout.approval import yes_or_no
from flows.rollout.evidence import evidence_of_move
from tasks.verdicts.verdict import Verdict

EXIT_NOT_MOVED = 3


def promote(
    model: Model = None,
    to: To = None,
    form: Placement = "auto",
    yes: Annotated[bool, typer.Option("--yes", help="Move it although its evidence is not PASS.")] = False,
    json_: Json = False,
) -> None:
    """Move a model to another engine without failing a request; the way back is saved first.

    Example: `switchyard promote MODEL --yes`

    Prints what the evidence says of that model. Where that is not PASS it asks; without a terminal it needs --yes.
    Exit code 3: nothing was moved.
    """
    found = evidence_of_move(home(), model, to)
    if found is not None:
        move, known = found
        verdict = known.verdict or Verdict.INCONCLUSIVE
        errors.print("evidence on ", move, ": ", verdict_text(verdict), sep="", end="")
        errors.print(f": {known.why}", markup=False)
        is_asked = sys.stdin.isatty() and sys.stderr.isatty()
        if not (known.open or yes or (is_asked and yes_or_no(f"Move {move} all the same?", errors))):
            advice = "`switchyard evaluate` first, or add --yes to move it all the same"
            why = f"nothing was moved: the evidence on {move} is not PASS; {advice}"
            refused = {"done": None, "verdict": verdict.value, "evidence": known.why, "why": why}
            finish(refused, json_, lambda _: out.print(why, markup=False), EXIT_NOT_MOVED)
    order("promote", json_, model=model, to=to, form=form)
