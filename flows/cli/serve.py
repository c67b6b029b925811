"""`switchyard serve`: the yard in the foreground."""

from pathlib import Path

from engines.home import home
from engines.yard.config import YardConfig
from engines.yard.serve import log_to_terminal, run
from engines.yard.yard import Yard
from flows.cli.options import PlanFile
from flows.cli.output import errors, print_step
from flows.rollout.yard_config import unsupported, yard_config
from migrations.plan_file import load_plan, plan_path, remember_plan


def serve(plan: PlanFile = None) -> None:
    """Serve every model of the plan on one public port and supervise its engines, in the foreground.

    Ctrl-C or SIGTERM finishes the requests in flight and stops; a second one stops at once. SIGHUP reloads the plan.
    """
    folder = home()
    path = plan_path(plan, folder)
    log_to_terminal()

    def read_config(named: Path = path) -> YardConfig:
        return yard_config(load_plan(named))

    def opened(yard: Yard) -> None:
        remember_plan(path, folder)
        address = f"http://{yard.settings.host}:{yard.settings.port}/v1"
        errors.print(f"serving {', '.join(yard.routes)} on [bold]{address}[/bold]")
        for line in unsupported(load_plan(path), yard.config):
            print_step(f"not supported by {line}")

    run(read_config, home=folder, opened=opened)
