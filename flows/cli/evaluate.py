"""`switchyard evaluate`: phase 1, and what it prints."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape
from rich.text import Text

from engines.errors import BadInput
from flows.cli.options import Json
from flows.cli.output import (
    errors,
    evaluation_table,
    finish,
    next_command,
    out,
    prepared_home,
    print_step,
    verdict_text,
)
from flows.evaluation.beside import lacking
from flows.evaluation.rejudge import plan_of
from flows.evaluation.run import checked, introduction, refuse_retired
from flows.orchestrator.server import with_prefect
from migrations.demo import Block, demo_blocks
from migrations.plan import Plan
from migrations.plan_file import load_plan
from tasks.records.store import open_records
from tasks.verdicts.limits import Measure
from tasks.verdicts.verdict import Verdict, worst

DURATION = re.compile(r"^(\d+(?:\.\d+)?)(s|m|h|d)$")
FIRST_LOOK = "performance.first_look"
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def evaluate(
    target: Annotated[str | None, typer.Argument(help="`demo`, or a plan (.toml) from `switchyard init`.")] = None,
    resume: Annotated[str | None, typer.Option(help="Resume a killed run: its id, part of it, or `latest`.")] = None,
    soak: Annotated[str | None, typer.Option(help="Length of the soak, not the plan's: 90s, 2m, 6h or 3d.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A first look, a minute a model: FAIL, or worth the whole.")
    ] = False,
    allow_retired: Annotated[bool, typer.Option("--allow-retired", help="Start engines that were retired.")] = False,
    json_: Json = False,
) -> None:
    """Phase 1: measure both engines on every model and judge whether the candidate may take over.

    Example: `switchyard evaluate switchyard.toml --soak 6h`

    Exit code 0: the gate is open for every model. An interrupted run keeps what it measured: `--resume latest`.
    `--quick` never opens a gate: 3 where a model fails, 4 where each is worth the whole evaluation.
    """
    if quick and (resume or soak):
        raise BadInput(f"--quick cannot be combined with {'--resume' if resume else '--soak'}; remove one of them")
    folder = prepared_home()
    command = ["switchyard", "evaluate", "demo" if target == "demo" else str(Path(target or "").absolute())]
    command += ["--soak", soak] if soak else []
    command += ["--quick"] if quick else []
    if target == "demo" and not resume:
        blocks = list(demo_blocks(folder, soak_s=_seconds(soak)))
        evaluate_demo(folder, blocks, allow_retired=allow_retired, quick=quick, command=tuple(command), json_=json_)
    plan, run_id = _plan_and_run(target, resume, soak)
    if not allow_retired:
        refuse_retired(plan, folder)
    introduce(plan, folder)
    with open_records() as records:  # records that cannot be written are better known before 10 minutes of work
        earlier = None if run_id else records.unfinished(plan.model_dump(mode="json"))
    if earlier is not None and not quick:
        errors.print(f"run {earlier.id} of this plan is unfinished; to resume it: --resume {earlier.id}")
    run = with_prefect(folder, "flows.evaluate:evaluate")
    finish(run(plan, run_id, allow_retired, quick=quick, command=tuple(command)), json_, partial(_show, target or ""))


def evaluate_demo(
    folder: Path,
    blocks: Sequence[Block],
    *,
    allow_retired: bool,
    quick: bool,
    command: tuple[str, ...],
    json_: bool,
) -> NoReturn:
    """The demo's evaluations one after the other, each with its question, then the answers side by side."""
    run, outcomes = with_prefect(folder, "flows.evaluate:evaluate"), []
    for number, block in enumerate(blocks, 1):
        errors.print(f"\n[bold]{number} of {len(blocks)}: {block.title}[/bold]\n{block.asks}")
        introduce(block.plan, folder)
        outcome = run(block.plan, None, allow_retired, quick=quick or block.quick, command=command)
        outcomes.append({"block": block.title, "asks": block.asks, **outcome})
        if not json_:
            show_verdicts(outcome, caveats=number == 1)
    verdict = worst(Verdict(outcome["verdict"]) for outcome in outcomes)
    finish({"verdict": verdict.value, "blocks": outcomes}, json_, _show_blocks)


def _show_blocks(demo: Mapping[str, Any]) -> None:
    out.print("\n[bold]the demo in short[/bold]")
    for number, block in enumerate(demo["blocks"], 1):
        out.print(f"  {number}  [bold]{block['block']}[/bold]  {block['asks']}")
        for model in block["models"]:
            said = _in_short(model, quick=block["quick"])
            out.print(Text.assemble("     ", model["model"], "  ", verdict_text(model["verdict"]), "  ", said))
    out.print(next_command("switchyard init --from-port 8080") + " (or --from-command) to plan for your own server")


def _in_short(model: Mapping[str, Any], *, quick: bool) -> str:
    """`may move`; of a model that may not, what decided it; of one that may be worth it, the first look."""
    checks = {check["check"]: check["why"] for check in model["checks"]}
    if model["verdict"] == "PASS":
        return "may move"
    if model["verdict"] == "INCONCLUSIVE" and quick and FIRST_LOOK in checks:
        return f"not decided yet: {checks[FIRST_LOOK]}"
    return f"stays: {model['closed_by'][0]}: {checks[model['closed_by'][0]]}"


def introduce(plan: Plan, folder: Path) -> None:
    """Print what is compared, and what memory may lack. Raises what `checked` does."""
    for line in introduction(plan, checked(plan)):
        print_step(line)
    if (short := lacking(plan, folder)) is not None:
        errors.print(f"warning: memory is short: {short}; a running yard makes preflight.fit FAIL here")


def _seconds(soak: str | None) -> float | None:
    """The length of a soak in seconds; BadInput for what is no duration."""
    if not soak:
        return None
    match = DURATION.match(soak.strip())
    if match is None or float(match[1]) <= 0:
        raise BadInput(f"--soak {soak!r} is no duration; write 90s, 2m, 6h or 3d")
    return float(match[1]) * SECONDS[match[2]]


def _plan_and_run(target: str | None, resume: str | None, soak: str | None) -> tuple[Plan, str | None]:
    """The plan, and the run to resume, which keeps the plan it was started with."""
    soak_s = _seconds(soak)
    if resume:
        if soak_s is not None:
            raise BadInput("--soak: a resumed run keeps the plan it was started with; remove --soak")
        run_id, plan = plan_of(resume)
        if target not in (None, "demo") and load_plan(Path(target or "")) != plan:
            raise BadInput(f"{target} is not the plan of run {run_id}; resume that run without naming a plan")
        return plan, run_id
    if target is None:
        raise BadInput("name what to evaluate: `demo`, or a plan written by `switchyard init`")
    plan = load_plan(Path(target))
    if soak_s is not None:
        measure = Measure.model_validate({**plan.measure.model_dump(), "soak_s": soak_s})
        plan = plan.model_copy(update={"measure": measure})
    return plan, None


def _show(target: str, outcome: Mapping[str, Any]) -> None:
    show_verdicts(outcome)
    out.print(_next_step(outcome, target))


def show_verdicts(outcome: Mapping[str, Any], *, caveats: bool = True) -> None:
    """Print the verdicts, what the samples cannot prove (`caveats`), and where the report is."""
    out.print(evaluation_table(outcome), soft_wrap=False)
    if outcome["cannot_prove"] and caveats:
        what = "a first look" if outcome["quick"] else "these small samples"
        out.print(f"\n[bold]what {what} cannot prove[/bold]")
        for line in outcome["cannot_prove"]:
            out.print(f"  - {line}")
    out.print(f"\nrun {outcome['run_id']}: ", verdict_text(outcome["verdict"]), sep="")
    worth = [model["model"] for model in outcome["models"] if model["verdict"] == "INCONCLUSIVE"]
    if outcome["quick"] and worth:
        out.print(f"worth the whole evaluation: {', '.join(worth)}")
    out.print(f"report: {outcome['report']}")


def _next_step(outcome: Mapping[str, Any], target: str) -> str:
    verdict = outcome["verdict"]
    held = [model["model"] for model in outcome["models"] if model["verdict"] in ("FAIL", "ERROR")]
    if outcome["quick"] and len(held) < len(outcome["models"]):
        return next_command(f"switchyard evaluate {escape(target)}") + " measures the whole"
    if verdict == "PASS":
        return "next: keep the report as evidence; every model of this plan may move"
    if verdict == "ERROR":
        return f"next: fix what the report names, then [bold]switchyard evaluate --resume {outcome['run_id']}[/bold]"
    if held:
        return f"next: stay on the incumbent for {', '.join(held)}; the report has the reason and what would change it"
    return "next: raise blocks, prompts or soak time in the plan and evaluate again: that would settle it"
