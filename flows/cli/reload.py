from engines.home import home
from flows.cli.options import Json, PlanFile
from flows.cli.order import order
from flows.cli.output import print_done, print_step
from flows.rollout.yards import take_over


def reload(plan: PlanFile = None, json_: Json = False) -> None:
    """Make the yard read its plan again without dropping a request; an invalid plan is refused.

    With PLAN it serves that one from now on.
    """
    if plan is None:
        order("reload", json_)
    else:
        print_done(take_over(home(), plan, print_step), json_)
