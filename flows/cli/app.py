"""The `switchyard` command: its sub-commands by name, its errors and exit codes.

`switchyard X` is the function `x` of flows/cli/x.py. Its module is imported when the command is run, so that help
and completion load none of them.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from importlib import import_module
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from engines.environment import apply_to_this_process
from engines.errors import BadInput, SwitchyardError
from engines.home import program_version
from engines.redaction import redacted_text

EXIT_BAD_INPUT, EXIT_ENGINE, EXIT_INTERRUPTED = 2, 5, 130
_ENDED: list[object] = []  # the exit code, once there is one
INTERRUPT_S = 20.0
AGAIN_S = 0.05
# name and help line of every command, in the order of the help
COMMANDS = {
    "doctor": "Check Python, packages, engines, models, records and memory, and print how to fix what is missing.",
    "install": "Install an engine: with pip, with the vendor's script whose checksum you confirm, or with cargo.",
    "init": "Write a plan (TOML) from the engine you run now, and list what the candidate does not support.",
    "preflight": "Check from file headers, in milliseconds, whether each engine loads a model and memory suffices.",
    "convert": "Write a GGUF as a Hugging Face directory of 16-bit floats, with transformers, for vLLM.",
    "requantize": "Write a model in another quant, tensor by tensor, and print what its weights lose; no K quants.",
    "evaluate": "Phase 1: measure both engines on every model and judge whether the candidate may take over.",
    "upgrade": "Compare another build of the engine that serves with it, and move to it where its gate opens.",
    "status": "Show what runs now (the yard, its routes and engines, evaluations) and how the last run ended.",
    "incident": "Show what was kept of an engine before it was killed (log, threads, stacks), or list such incidents.",
    "history": "List the runs so far, newest first.",
    "report": "Write a run's HTML report again from its records, every verdict recomputed from the raw evidence.",
    "bench": "Measure what the yard adds on this machine: to the first token, to a call, and in CPU a chunk.",
    "serve": "Serve every model of the plan on one public port and supervise its engines, in the foreground.",
    "promote": "Move a model to another engine without failing a request; the way back is saved first.",
    "rollback": "Move a model back to its last good route, proven by a real token; a canary is removed first.",
    "canary": "Send a share of a model's conversations to another engine; each conversation stays on one engine.",
    "shadow": "Copy a share of a model's chat requests to another engine while nobody waits, to compare answers.",
    "use": "Choose a model's engine by hand; `auto` leaves the choice to promote and rollback.",
    "drain": "Hold a model's new requests and return when none is in flight; `--off` lets them through again.",
    "overflow": "Let the plan's second engine take new conversations while too many requests wait; `--off` ends it.",
    "load": "Load a model now, unloading others if the memory budget requires it; a request would do the same.",
    "unload": "Stop a model's engine once its requests are done; the next request loads it again.",
    "stop": "Stop the yard after finishing the requests in flight.",
    "reload": "Make the yard read its plan again without dropping a request; an invalid plan is refused.",
    "migrate": "Migrate every model: evaluate, subprocess, native, retire, with a gate before each phase.",
    "demo": "Migrate two demo models end to end: to a new build, and to another engine (up to half an hour).",
    "retire": "Phase 4: retire the incumbent, or list what still needs it; `switchyard restore` undoes it.",
    "guide": "Write the migration guide from the records: what changed, what is unsupported, how to undo it.",
    "restore": "Bring back a retired engine and what was uninstalled of it; promote a model to use it again.",
    "soak": "Put load on the candidate through the yard for one window, and judge the soak so far.",
    "up": "Start everything on this host: Prefect's server with its UI, the flows as deployments, and the yard.",
    "down": "Stop what `switchyard up` started, and the yard, after finishing the requests in flight.",
    "service": "Have systemd start the yard at boot: install, show or remove a unit of your own user.",
}
AFTER_INTERRUPT = {
    "evaluate": "; resume with [bold]switchyard evaluate --resume latest[/bold]",
    "demo": "; rerun this command to resume",
    "up": "; all is down",
    "upgrade": "; a yard that runs keeps serving; rerun this command to resume",
    "migrate": "; a yard that runs keeps serving; rerun this command to resume",
}


class Commands(TyperGroup):
    """The sub-commands, loaded when run; a Switchyard error is one line on standard error and an exit code."""

    def __init__(self, **settings: Any) -> None:
        settings["commands"] = {name: TyperCommand(name, help=line) for name, line in COMMANDS.items()}
        super().__init__(**settings)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that `args` name, imported now."""
        name, stub, rest = super().resolve_command(ctx, args)
        return name, stub and load_command(str(stub.name)), rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was named."""
        interrupted = threading.Event()
        try:
            with _terminated_like_ctrl_c(interrupted):
                return super().invoke(ctx)
        except BaseException as error:
            # an interrupt may come out of a library as an error of the library's own
            if not interrupted.is_set() and not isinstance(error, SwitchyardError):
                raise
            if interrupted.is_set():
                code, line = EXIT_INTERRUPTED, f"interrupted{AFTER_INTERRUPT.get(ctx.invoked_subcommand, '')}"
            else:
                code = EXIT_BAD_INPUT if isinstance(error, BadInput) else EXIT_ENGINE
                line = "[red]error:[/red] " + redacted_text(str(error)).replace("[", r"\[")
        Console(stderr=True).print(line, highlight=False, soft_wrap=True)
        raise typer.Exit(code)


def load_command(name: str) -> Any:
    """The real command `name`: the function, or the group of commands, of that name in its module."""
    found = getattr(import_module(f"flows.cli.{name}"), name)
    if not isinstance(found, typer.Typer):
        single = typer.Typer(add_completion=False, rich_markup_mode="rich")
        single.command(name)(found)
        found = single
    command = typer.main.get_command(found)
    command.name = name
    return command


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
        print(f"switchyard {program_version()}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the command itself."""


def main() -> None:
    """Run the command line."""
    apply_to_this_process()
    atexit.register(_leave_interrupted)  # the first one: it runs last
    try:
        app()
    except SystemExit as end:
        _ENDED.append(end.code)
        raise


def _leave_interrupted() -> None:
    """Leave with 130 after an interrupt, before Python gives its signal handlers back.

    Of 20 commands that were interrupted while Prefect started two had undone everything and then ended by the signal.
    """
    if EXIT_INTERRUPTED in _ENDED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_INTERRUPTED)


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
        # raised where Python calls back (a weak reference that ends), it goes nowhere: it comes again, elsewhere
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            sys.__unraisablehook__(lost)
            return
        again = threading.Timer(AGAIN_S, os.kill, (os.getpid(), signal.SIGINT))
        again.daemon = True
        again.start()

    sys.unraisablehook = but_interrupts
    # started in the background by a script, SIGINT may be ignored; it must not be
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    yield


def _leave_at_once() -> None:
    from engines.process.process import LEAVING, stop_all  # `--help` need not load it

    LEAVING.set()
    ending = threading.Thread(target=stop_all, daemon=True)
    ending.start()
    ending.join(INTERRUPT_S)  # what it does not get done, the kernel does when we are gone
    os._exit(EXIT_INTERRUPTED)
