"""The commands around the yard: `serve`, and the orders that a person gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from engines.home import home
from flows.cli.options import EXIT_CODES, Json, To, print_json

app = typer.Typer()

Model = Annotated[str | None, typer.Argument(help="The model; may be left out where there is only one.")]
FormOption = Annotated[
    str,
    typer.Option(
        help="auto, side-by-side (both engines at once) or one-at-a-time (where both do not fit into memory)."
    ),
]


@app.command()
def serve(
    plan: Annotated[
        Path | None, typer.Argument(help="The plan (.toml); the one served last, else ./switchyard.toml.")
    ] = None,
) -> None:
    """Own the public port: serve every model of the plan, supervise its engines, take orders. In the foreground.

    Ctrl-C or SIGTERM finishes the requests in flight and stops (a second one stops at once); SIGHUP reloads the plan.
    """
    from engines.yard.config import YardConfig
    from engines.yard.serve import run
    from engines.yard.yard import Yard
    from flows.rollout.yard_config import log_to_terminal, losses, plan_path, remember_plan, yard_config
    from migrations.plan_file import load_plan

    folder = home()
    path = plan_path(plan, folder)
    log_to_terminal()
    errors = Console(stderr=True)

    def read_config() -> YardConfig:
        return yard_config(load_plan(path))

    def opened(yard: Yard) -> None:
        remember_plan(path, folder)
        errors.print(
            f"serving {', '.join(yard.routes)} on [bold]http://{yard.settings.host}:{yard.settings.port}/v1[/bold]"
        )
        for loss in losses(load_plan(path), yard.config):
            errors.print(f"lost on {loss}", style="dim", highlight=False, soft_wrap=True)

    run(read_config, home=folder, opened=opened)


@app.command()
def promote(
    model: Model = None,
    to: To = None,
    form: FormOption = "auto",
    json_: Json = False,
) -> None:
    """Move a model to another engine; no request fails, and the way back is saved first."""
    _order("promote", json_, model=model, to=to, form=form)


@app.command()
def rollback(
    model: Model = None,
    who: Annotated[str, typer.Option(help="Who wants it; recorded.")] = "",
    reason: Annotated[str, typer.Option(help="Why; recorded.")] = "",
    form: FormOption = "auto",
    json_: Json = False,
) -> None:
    """Back to the last good route of a model, proven by a real token; a canary is taken out first.

    Needs neither Prefect nor the database: the yard itself keeps the way back.
    """
    from flows.rollback import Wish, roll_back

    errors = Console(stderr=True)
    wish = Wish(who=who, reason=reason, form=form)
    outcome = roll_back(home(), model, wish, lambda step: errors.print(step, style="dim", highlight=False))
    if json_:
        print_json(outcome)
    else:
        Console().print(outcome["done"], highlight=False, soft_wrap=True)
    raise typer.Exit(EXIT_CODES[outcome["verdict"]])


@app.command()
def canary(
    model: Model = None,
    weight: Annotated[float, typer.Option(min=0, max=0.99, help="Share of conversations; 0 takes it out.")] = 0.1,
    to: To = None,
    json_: Json = False,
) -> None:
    """Let another engine answer a share of a model's conversations; each conversation stays where it is."""
    _order("canary", json_, model=model, to=to, weight=weight)


@app.command()
def shadow(
    model: Model = None,
    share: Annotated[float, typer.Option(min=0, max=1, help="Share of chat requests; 0 takes it out.")] = 0.1,
    to: To = None,
    json_: Json = False,
) -> None:
    """Copy a share of a model's chat requests to another engine when nobody waits; its answers are compared only."""
    _order("shadow", json_, model=model, to=to, share=share)


@app.command()
def use(
    engine: Annotated[str, typer.Argument(help="auto, or an engine's name.")],
    model: Model = None,
    json_: Json = False,
) -> None:
    """Choose the engine of a model by hand; `auto` leaves it to promote and rollback."""
    _order("use", json_, model=model, engine=engine)


@app.command()
def drain(
    model: Model = None,
    off: Annotated[bool, typer.Option("--off", help="Let requests go on again.")] = False,
    json_: Json = False,
) -> None:
    """Hold new requests of a model and return when none is in flight."""
    _order("drain", json_, model=model, on=not off)


@app.command()
def load(model: Model = None, json_: Json = False) -> None:
    """Load a model now, unloading others where the memory budget asks for it; a request would do the same."""
    _order("load", json_, model=model)


@app.command()
def unload(model: Model = None, json_: Json = False) -> None:
    """End a model's engine once its requests are done; the next request loads it again."""
    _order("unload", json_, model=model)


@app.command()
def stop(json_: Json = False) -> None:
    """Stop the yard; requests in flight are finished first."""
    _order("stop", json_)


@app.command()
def reload(json_: Json = False) -> None:
    """Have the yard read its plan again, without dropping a request; a bad plan is refused and the old one stays."""
    _order("reload", json_)


def _order(name: str, json_: bool, **body: Any) -> None:
    from engines.yard.client import YardClient

    errors = Console(stderr=True)
    given = {key: value for key, value in body.items() if value is not None}
    done = YardClient(home()).order(name, lambda step: errors.print(step, style="dim", highlight=False), **given)
    if json_:
        print_json({"done": done})
    else:
        Console().print(done, highlight=False, soft_wrap=True)
