"""The `switchyard` command."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from engines.environment import apply_to_this_process
from engines.errors import BadInput, SwitchyardError
from engines.home import home
from engines.redaction import redacted_text
from flows.cli import migrate as migrate_command
from flows.cli import retire as retire_commands
from flows.cli import service, up
from flows.cli import soak as soak_command
from flows.cli import yard as yard_commands
from flows.cli.options import EXIT_CODES, Json, print_json

EXIT_BAD_INPUT, EXIT_ENGINE, EXIT_INTERRUPTED = 2, 5, 130
INTERRUPT_S = 20.0
GO_ON = {
    "evaluate": "; a run goes on with [bold]switchyard evaluate --resume latest[/bold]",
    "demo": "; the same command goes on where this one stopped",
    "up": "; all is down",
    "migrate": "; the yard goes on serving, and the same command goes on where this one stopped",
}
DURATION = re.compile(r"^(\d+(?:\.\d+)?)(s|m|h|d)$")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class Commands(TyperGroup):
    """Every error of ours is one line on standard error, and an exit code that means something."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run the command that was named."""
        errors = Console(stderr=True)
        interrupted = threading.Event()
        try:
            with _terminated_like_ctrl_c(interrupted):
                return super().invoke(ctx)
        except BaseException as error:
            # an interrupt may come out of a library as an error of the library's own
            if not interrupted.is_set() and not isinstance(error, SwitchyardError):
                raise
            go_on = GO_ON.get(ctx.invoked_subcommand or "", "") if interrupted.is_set() else None
            code = self._say(error, errors, go_on)
        raise typer.Exit(code)

    @staticmethod
    def _say(error: BaseException, errors: Console, go_on: str | None) -> int:
        """The one line, and the exit code; `go_on` says what to do after an interrupt, None when there was none."""
        if go_on is not None:
            errors.print(f"interrupted{go_on}", highlight=False, soft_wrap=True)
            return EXIT_INTERRUPTED
        errors.print(f"[red]error:[/red] {_plain(error)}", highlight=False, soft_wrap=True)
        return EXIT_BAD_INPUT if isinstance(error, BadInput) else EXIT_ENGINE


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Switch the inference engine under a local LLM on evidence, one reversible move at a time.\n\n"
    "Start with [bold]switchyard evaluate demo[/bold], then plan for your own server with "
    "[bold]switchyard init --from-port 8080[/bold].\n\n"
    "Exit codes: 0 done or gate open, 2 bad input, 3 gate closed, 4 inconclusive, 5 engine or environment error, "
    "130 interrupted.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            print(f"switchyard {metadata.version('switchyard-llm')}")
        except metadata.PackageNotFoundError:
            print("switchyard, run from a checkout that is not installed")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command()
def doctor(
    json_: Json = False,
    prefect: Annotated[
        bool,
        typer.Option("--prefect", help="Also start Prefect's server and see that a schedule makes runs (about 20 s)."),
    ] = False,
) -> None:
    """Check this machine: Python, packages, engines, models, records, memory; and say how to mend what is missing."""
    from flows.cli.doctor import examine

    findings = examine(prefect=prefect)
    if json_:
        print_json({"findings": [finding.as_dict() for finding in findings]})
    else:
        out = Console()
        for finding in findings:
            mark = {"ok": "[green]✓[/green]", "warning": "[yellow]![/yellow]", "broken": "[red]✗[/red]"}[finding.state]
            out.print(f"{mark} {finding.what}: {finding.detail}", highlight=False)
            if finding.mend:
                out.print(f"    {finding.mend}", highlight=False, style="cyan")
        broken = sum(finding.state == "broken" for finding in findings)
        out.print(_next("switchyard evaluate demo") if not broken else f"{broken} to mend, see above")
    raise typer.Exit(EXIT_ENGINE if any(finding.state == "broken" for finding in findings) else 0)


@app.command()
def install(
    engine: Annotated[str, typer.Argument(help="llama.cpp or mistral.rs")],
    vendor_script: Annotated[
        bool,
        typer.Option("--vendor-script", help="Use the vendor's own installer, at a pinned version, instead of pip."),
    ] = False,
    sha256: Annotated[
        str | None, typer.Option(help="Confirm the vendor script by its checksum instead of being asked.")
    ] = None,
) -> None:
    """Install an engine: with pip, or with the vendor's script once you have confirmed its checksum."""
    from engines import install as installing
    from engines.registry import driver

    chosen = driver(engine)
    if vendor_script:
        script = installing.fetch_script(chosen)
        if not installing.run_script(chosen, script, lambda s: _confirmed(s.url, s.version, s.sha256, sha256)):
            raise BadInput("nothing was installed: the script's checksum was not confirmed")
    else:
        installing.install_with_pip(chosen, home())
    found = chosen.find()
    Console().print(f"{engine} {found.version} is there: {found.where}", highlight=False)


@app.command()
def init(
    from_port: Annotated[
        int | None, typer.Option(help="Read the running llama-server that listens on this port.")
    ] = None,
    from_command: Annotated[str | None, typer.Option(help="Read a llama-server command line (quote it).")] = None,
    model: Annotated[list[Path] | None, typer.Option(help="A GGUF to evaluate; repeat for several.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the plan goes.")] = Path("switchyard.toml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing plan.")] = False,
    json_: Json = False,
) -> None:
    """Write a plan (TOML) from the llama-server you run now; every flag that mistral.rs cannot honour is named."""
    from flows.cli.init import write_plan

    written = write_plan(from_port=from_port, from_command=from_command, models=model or [], output=output, force=force)
    if json_:
        print_json(written)
        return
    out = Console()
    out.print(f"{output} written: {', '.join(written['models'])}", highlight=False)
    for title, word in (("losses", "lost"), ("notes", "note"), ("unknown", "not understood")):
        for line in written[title]:
            out.print(f"  {word}: {line}", highlight=False, soft_wrap=True)
    out.print(_next(f"switchyard preflight {output}") + ", then " + f"[bold]switchyard evaluate {output}[/bold]")


@app.command()
def preflight(
    targets: Annotated[list[Path], typer.Argument(help="A plan (.toml), or GGUF files.")],
    context: Annotated[
        int | None, typer.Option(min=1, help="Context in tokens, instead of the plan's or the model's.")
    ] = None,
    json_: Json = False,
) -> None:
    """Say in milliseconds, from the files' headers alone: does each engine load the model, and does it fit?"""
    from flows.cli import tables
    from flows.cli.preflight import examine

    report = examine(targets, context=context)
    if json_:
        print_json(report)
    else:
        Console().print(tables.preflight(report), highlight=False)
    answers = [
        entry["loads"] for model in report["models"] for entry in model["engines"] if entry["engine"] == "mistral.rs"
    ]
    raise typer.Exit(3 if "no" in answers else 4 if "unknown" in answers else 0)


@app.command()
def evaluate(
    target: Annotated[
        str | None, typer.Argument(help="`demo`, or a plan (.toml) written by `switchyard init`.")
    ] = None,
    resume: Annotated[
        str | None, typer.Option(help="Go on with a run that was killed: its id, part of it, or `latest`.")
    ] = None,
    soak: Annotated[
        str | None, typer.Option(help="Length of the soak, such as 90s, 2m, 6h or 3d; the plan's otherwise.")
    ] = None,
    allow_retired: Annotated[
        bool, typer.Option("--allow-retired", help="Start an engine of the plan although it was retired here.")
    ] = False,
    json_: Json = False,
) -> None:
    """Phase 1: run both engines over every model, compare them, and judge whether the candidate may take over.

    Exit code 0 means the gate is open for every model. An interrupted run keeps what it measured: --resume latest.
    """
    folder = _prepared_home()
    plan, run_id = _what_to_run(target, resume, soak, folder)
    outcome = _evaluate(plan, run_id, folder, allow_retired=allow_retired)
    if json_:
        print_json(outcome)
    else:
        _show_outcome(outcome)
    raise typer.Exit(EXIT_CODES[outcome["verdict"]])


@app.command()
def status(
    watch: Annotated[bool, typer.Option("--watch", help="Show the yard live, once a second, until Ctrl-C.")] = False,
    json_: Json = False,
) -> None:
    """What runs now: the yard with its routes and engines, evaluations; and how the last evaluation ended."""
    from engines.home import home
    from engines.yard.client import YardClient
    from flows.cli import status as status_view
    from flows.evaluation.rejudge import current

    yard = YardClient(home())
    if watch:
        if json_:
            raise BadInput("--watch is for people, --json for programs: leave one of them away")
        status_view.watch(yard, Console())
        return
    folder, asked = _prepared_home(), status_view.ask(yard)
    if json_:
        print_json({**current(folder), "yard": asked[0]})
        return
    out = Console()
    out.print(status_view.shown(asked), "", soft_wrap=asked[0] is None)  # before anything waits for the database
    state = current(folder)
    _show_evaluations(state, out, skip=status_view.pids(asked[0]))


def _show_evaluations(state: dict[str, Any], out: Console, *, skip: frozenset[int]) -> None:
    from flows.cli import tables

    if state["records"]:
        out.print(f"records: {_plain(state['records'])}; history not shown", highlight=False, soft_wrap=True)
    elif not state["running"]:
        out.print("no evaluation is running", highlight=False)
    for run in state["running"]:
        out.print(
            f"run {run['run_id']} ({run['plan']}) is running: pid {run['pid']}, evidence: {run['evidence']}",
            highlight=False,
        )
    for engine in state["processes"]:
        if engine["pid"] in skip:
            continue
        out.print(f"  {engine['name']} (pid {engine['pid']}), {tables.size(engine['memory_bytes'])}", highlight=False)
    for ended in state["ended"]:
        out.print(f"  ended, left behind by a killed run: {ended}", highlight=False)
    if state["last"]:
        out.print(tables.history([state["last"]]))
        if state["last"]["status"] in ("killed", "interrupted", "failed"):
            goes_on = f"switchyard evaluate --resume {state['last']['run_id']}"
            out.print(_next("switchyard migrate" if state["last"]["kind"] == "migrate" else goes_on))


@app.command()
def history(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many runs.")] = 20,
    json_: Json = False,
) -> None:
    """The runs so far, newest first."""
    from flows.cli import tables
    from flows.evaluation.rejudge import past

    _prepared_home()
    runs = past(limit)
    if json_:
        print_json({"runs": runs})
    elif not runs:
        Console().print("no run yet; " + _next("switchyard evaluate demo"))
    else:
        Console().print(tables.history(runs))
        evaluations = [run["run_id"] for run in runs if run["kind"] == "evaluate"]
        Console().print(_next(f"switchyard report {evaluations[0]}" if evaluations else "switchyard status"))


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="A run's id, part of it, or `latest`.")] = "latest",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where the HTML goes.")] = None,
    json_: Json = False,
) -> None:
    """Write a run's HTML report again from its records, every verdict recomputed from the raw evidence."""
    from flows.cli import tables
    from flows.evaluation.rejudge import rejudge

    outcome = rejudge(_prepared_home(), run, output)
    if json_:
        print_json(outcome)
        return
    Console().print(tables.evaluation(outcome))
    Console().print(f"\nreport: {outcome['report']}", highlight=False, soft_wrap=True)


app.add_typer(yard_commands.app)
app.add_typer(migrate_command.app)
app.add_typer(retire_commands.app)
app.add_typer(soak_command.app)
app.add_typer(up.app)
app.add_typer(service.app, name="service")


def main() -> None:
    """Run the command line."""
    apply_to_this_process()
    app()


@contextlib.contextmanager
def _terminated_like_ctrl_c(interrupted: threading.Event) -> Iterator[None]:
    """SIGTERM and SIGHUP unwind the stack as Ctrl-C does, so that every `finally` ends its engine.

    An interrupt that hits a library at a bad moment may hang there: INTERRUPT_S later the engines are ended all the
    same.
    """
    last_resort = threading.Timer(INTERRUPT_S, _leave_at_once)
    last_resort.daemon = True

    def interrupt(*_: object) -> None:
        interrupted.set()
        if last_resort.ident is None:
            last_resort.start()
        raise KeyboardInterrupt

    def but_interrupts(lost: Any) -> None:
        # raised where Python calls back (a weak reference that ends), it goes nowhere: the timer takes over
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            sys.__unraisablehook__(lost)

    sys.unraisablehook = but_interrupts
    # started in the background by a script, SIGINT may be ignored; it must not be
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    yield


def _leave_at_once() -> None:
    from engines.process.process import stop_all

    ending = threading.Thread(target=stop_all, daemon=True)
    ending.start()
    ending.join(INTERRUPT_S)  # what it does not get done, the kernel does when we are gone
    os._exit(EXIT_INTERRUPTED)


def _prepared_home() -> Path:
    """Switchyard's folder, with whatever a killed run left running ended."""
    from engines.home import home
    from engines.process.process import end_orphans

    folder = home()
    for ended in end_orphans(folder):
        Console(stderr=True).print(f"ended, left behind by a killed run: {ended}", style="dim", highlight=False)
    return folder


def _what_to_run(target: str | None, resume: str | None, soak: str | None, home: Path) -> tuple[Any, str | None]:
    """The plan, and the run to go on with. A resumed run keeps the plan it was started with."""
    from flows.evaluation.rejudge import plan_of
    from migrations.demo import demo_plan
    from migrations.plan_file import load_plan
    from tasks.verdicts.limits import Measure

    soak_s = _seconds(soak) if soak else None
    if resume:
        if soak_s is not None:
            raise BadInput("--soak: a resumed run keeps the plan it was started with; leave --soak away")
        run_id, plan = plan_of(resume)
        if target not in (None, "demo") and load_plan(Path(target or "")) != plan:
            raise BadInput(f"{target} is not the plan of run {run_id}; leave the plan away to go on with that run")
        return plan, run_id
    if target is None:
        raise BadInput("name what to evaluate: `demo`, or a plan written by `switchyard init`")
    if target == "demo":
        return demo_plan(home, soak_s=soak_s), None
    plan = load_plan(Path(target))
    if soak_s is not None:
        measure = Measure.model_validate({**plan.measure.model_dump(), "soak_s": soak_s})
        plan = plan.model_copy(update={"measure": measure})
    return plan, None


def _evaluate(plan: Any, run_id: str | None, home: Path, *, allow_retired: bool) -> dict[str, Any]:
    """The flow, under the user's Prefect server or a temporary one, with progress on standard error."""
    from flows.evaluation.beside import lacking
    from flows.evaluation.run import checked, introduction, refuse_retired
    from flows.orchestrator.server import with_prefect
    from tasks.records.store import open_records

    errors = Console(stderr=True)
    if not allow_retired:
        refuse_retired(plan, home)
    for line in introduction(plan, checked(plan)):
        errors.print(line, highlight=False, style="dim", soft_wrap=True)
    if (short := lacking(plan, home)) is not None:
        errors.print(f"warning: memory is short: {short}; a running yard makes preflight.fit FAIL here", soft_wrap=True)
    with open_records() as records:  # records that cannot be written are better known before 10 minutes of work
        earlier = None if run_id else records.unfinished(plan.model_dump(mode="json"))
    if earlier is not None:
        errors.print(f"run {earlier.id} of this plan did not get done; to go on with it: --resume {earlier.id}")

    def flow() -> Any:
        from flows.evaluate import evaluate

        return evaluate

    return with_prefect(home, flow)(plan, run_id, allow_retired)


def _show_outcome(outcome: dict[str, Any]) -> None:
    from flows.cli import tables

    out = Console()
    out.print(tables.evaluation(outcome))
    if outcome["cannot_prove"]:
        out.print("\n[bold]what these small samples cannot prove[/bold]")
        for line in outcome["cannot_prove"]:
            out.print(f"  - {line}", highlight=False)
    out.print(f"\nrun {outcome['run_id']}: ", tables.verdict_text(outcome["verdict"]), sep="")
    out.print(f"report: {outcome['report']}", highlight=False, soft_wrap=True)
    out.print(next_step(outcome))


def next_step(outcome: dict[str, Any]) -> str:
    """The last line of an evaluation: what to do now."""
    verdict = outcome["verdict"]
    held = [model["model"] for model in outcome["models"] if model["verdict"] in ("FAIL", "ERROR")]
    if outcome["cannot_prove"]:  # the demo's small samples
        return _next("switchyard init --from-port 8080") + " (or --from-command) to plan for your own server"
    if verdict == "PASS":
        return "next: keep the report as evidence; every model of this plan may move"
    if verdict == "ERROR":
        return (
            "next: fix what the report names, then " + f"[bold]switchyard evaluate --resume {outcome['run_id']}[/bold]"
        )
    if held:
        return f"next: stay on the incumbent for {', '.join(held)}; the report says why and what would change it"
    return "next: more blocks, prompts or soak time would settle it: raise them in the plan and evaluate again"


def _seconds(text: str) -> float:
    match = DURATION.match(text.strip())
    if match is None or float(match[1]) <= 0:
        raise BadInput(f"--soak {text!r} is no duration; write 90s, 2m, 6h or 3d")
    return float(match[1]) * SECONDS[match[2]]


def _confirmed(url: str, version: str, digest: str, expected: str | None) -> bool:
    out = Console(stderr=True)
    out.print(f"script:  {url}\nversion: {version}\nsha256:  {digest}", highlight=False, soft_wrap=True)
    if expected is not None:
        if expected.lower() != digest:
            raise BadInput(f"--sha256: the fetched script has {digest}; nothing was run")
        return True
    return typer.confirm("Run this script?", default=False, err=True)


def _next(command: str) -> str:
    return f"next: [bold]{command}[/bold]"


def _plain(error: object) -> str:
    return redacted_text(str(error)).replace("[", r"\[")


if __name__ == "__main__":
    main()
