"""How a run ends in Prefect: PASS is Completed, a closed gate Failed by its verdict's name, a refusal Cancelled."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, cast

from prefect import Flow, State
from prefect.runtime import deployment
from prefect.states import Cancelled, Completed, Failed

from engines.home import program_version
from flows.experiment_lock import Refused
from flows.progress import progress
from tasks.evidence.unmeasured import PASS_WITHOUT_SOAK
from tasks.verdicts.verdict import Verdict

Asked = ParamSpec("Asked")
VERSION = program_version()
NOTHING_MOVED = "nothing had moved"
NOTHING_NEW = "no new build"
# results without a gate: a soak that is not over or left out on purpose, a report, nothing to roll back or to compare
NOT_JUDGED = ("window added", "nothing to soak", PASS_WITHOUT_SOAK, "report written", NOTHING_MOVED, NOTHING_NEW)


def state_of(outcome: Mapping[str, Any]) -> State[Any]:
    """The state of a run with this outcome, named after its verdict; the outcome is its data in this process."""
    verdict, result = str(outcome.get("verdict")), outcome.get("result")
    if result in NOT_JUDGED:
        return Completed(name=str(result), message=_said(outcome), data=outcome)
    kind = Completed if verdict == Verdict.PASS else Failed
    return kind(name=verdict, message=_said(outcome), data=outcome)


def _said(outcome: Mapping[str, Any]) -> str:
    """Why, or how it ended for each model, and where its report is."""
    ends = [f"{end['model']}: {end.get('result') or end['verdict']}" for end in outcome.get("models") or ()]
    report = [f"report: {outcome['report']}"] if outcome.get("report") else []
    return str(outcome.get("why") or "; ".join([*ends, *report]) or outcome.get("run_id") or "")


def _signed_as(work: Callable[..., Any]) -> Callable[[Callable[Asked, Any]], Callable[Asked, Any]]:
    """Wraps as `functools.wraps` does, with types in place of their names: Prefect looks names up in our module."""

    def signed(run: Callable[Asked, Any]) -> Callable[Asked, Any]:
        wrapped: Any = functools.update_wrapper(run, work)
        wrapped.__signature__ = inspect.signature(work, eval_str=True)
        return cast(Callable[Asked, Any], wrapped)

    return signed


def concluding(work: Callable[Asked, dict[str, Any]]) -> Callable[Asked, Any]:
    """`work` for a deployment: there its outcome, or that it was refused, becomes the state of the run."""

    @_signed_as(work)
    def run(*args: Asked.args, **kwargs: Asked.kwargs) -> Any:
        try:
            outcome = work(*args, **kwargs)
        except Refused as why:
            if deployment.id is None:  # started by a command, which prints it
                raise
            progress.get().note(str(why))
            return Cancelled(message=str(why))
        return outcome if deployment.id is None or isinstance(outcome, State) else state_of(outcome)

    return run


def by_command(flow: Flow[..., Any]) -> Callable[..., dict[str, Any]]:
    """`flow` for a command: its outcome is returned, what it raises is raised, and Prefect shows the same as a state.

    Ctrl-C and a refusal are Cancelled there, not a crash or a failure.
    """

    def run(*args: Any, **kwargs: Any) -> dict[str, Any]:
        stopped: list[BaseException] = []

        @_signed_as(flow.fn)
        def concluded(*given: Any, **named: Any) -> Any:
            try:
                return state_of(flow.fn(*given, **named))
            except (Refused, KeyboardInterrupt) as why:
                stopped.append(why)
                return Cancelled(message=str(why) or "interrupted")

        same = flow.with_options()
        same.fn = concluded
        state: Any = same(*args, return_state=True, **kwargs)
        if stopped:
            raise stopped[0]
        # a failed state holds the outcome of a closed gate, or what was raised
        found = state.result(raise_on_failure=False)
        if isinstance(found, BaseException):
            raise found
        return dict(found)

    return run
