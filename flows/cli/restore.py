"""`switchyard restore`: the undo of phase 4."""

from typing import Annotated

import typer

from engines.home import home
from flows.cli.options import Json
from flows.cli.output import print_done, print_step
from flows.orchestrator.server import prepare_process


def restore(engine: Annotated[str, typer.Argument(help="The retired engine.")], json_: Json = False) -> None:
    """Bring back a retired engine and what was uninstalled of it; promote a model to use it again."""
    folder = home()
    prepare_process(folder)
    from flows.deprecate import restore as restore_engine  # imports Prefect, which reads its settings then

    print_done(restore_engine(engine, folder, print_step), json_)
