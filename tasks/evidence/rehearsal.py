"""The fallback rehearsed on a yard of its own, before any traffic moves.

hidden     the candidate was chosen and is not on this machine: the incumbent serves
killed     the candidate's process is killed while it serves: it is restarted and serves
fallback   it is killed once more, with its restarts spent: the incumbent serves

That yard has its own home and port, and only its own engines are killed: no user's requests pass through it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
from pydantic import SecretStr

from engines.errors import BadInput, SwitchyardError
from engines.fit import Fit, estimate
from engines.model.free_memory import FreeMemory, free_memory
from engines.model.header import read_header
from engines.settings import Endpoint
from engines.yard.client import YardClient
from engines.yard.engine.launch_spec import LaunchSpec
from tasks.evidence.behaviours.caller import Caller, Malformed, Refused
from tasks.verdicts.verdict import CheckResult, Verdict, at_most, not_measured

DRILLS = ("hidden_candidate", "killed_candidate", "fallback")
CONNECT_S = 10.0
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A yard that runs for the rehearsal alone: its control client and its public port."""

    client: YardClient
    address: str
    key: SecretStr | None
    model_id: str
    incumbent: str
    candidate: str
    wait_s: float

    def route(self) -> dict[str, Any]:
        """The model's route as the yard reports it."""
        return route_of(self.client, self.model_id)

    def answer(self) -> dict[str, Any]:
        """One token through the public port, with the engine that gave it."""
        answer = one_token(self.address, self.model_id, self.key, wait_s=self.wait_s)
        samples = self.client.samples(self.model_id) if answer["answered"] else []
        return {**answer, "by": samples[-1]["engine"] if samples else None}


# A stage without the engine that is named (None: with both); it is gone when the block ends.
OpenStage = Callable[[str | None], AbstractContextManager[Stage]]


def route_of(client: YardClient, model_id: str) -> dict[str, Any]:
    """The route of a model out of a yard's status. Raises BadInput when the yard does not serve it."""
    routes = {route["id"]: route for route in client.status()["models"]}
    if model_id not in routes:
        raise BadInput(f"the yard that runs does not serve {model_id}: it has {', '.join(routes)}")
    found: dict[str, Any] = routes[model_id]
    return found


def engine_of(route: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One engine of a route. Raises SwitchyardError when the yard has none of that name."""
    found: dict[str, Any] | None = next((engine for engine in route["engines"] if engine["engine"] == name), None)
    if found is None:
        raise SwitchyardError(
            f"the yard has no {name} for {route['id']}: see `switchyard doctor`, then `switchyard reload`"
        )
    return found


def one_token(address: str, model_id: str, key: SecretStr | None, *, wait_s: float) -> dict[str, Any]:
    """The result of one request of one token: answered or not, seconds, and what went wrong.

    A yard holds the request while no engine is up, `wait_s` at most.
    """
    endpoint = Endpoint(base_url=address, model_id=model_id, engine="yard", api_key=key)
    asked = {"model": model_id, "max_tokens": 1, "temperature": 0}
    # a model without a chat template may refuse a chat and complete a text
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {**asked, "messages": [{"role": "user", "content": "Hi"}]},
        "/v1/completions": {**asked, "prompt": "Hi"},
    }
    began, error = time.monotonic(), ""
    with Caller(endpoint, read_timeout_s=wait_s + CONNECT_S, verify=False) as caller:
        for path, body in bodies.items():
            try:
                answer = caller.post(path, body)
                if answer.used("completion_tokens") >= 1:
                    return {"answered": True, "took_s": time.monotonic() - began, "error": None}
                error = error or f"an answer without a token: {answer.error_text}"
            except (Refused, Malformed) as problem:
                error = error or str(problem)
            except httpx.HTTPError as problem:
                error = error or f"{type(problem).__name__}: {problem}"
    return {"answered": False, "took_s": time.monotonic() - began, "error": " ".join(error.split())}


def room(specs: Mapping[str, LaunchSpec], held_bytes: int | None, held_vram_bytes: int | None) -> tuple[str, str]:
    """How both engines can be rehearsed beside the one that serves, and why.

    "auto" (the yard decides), "one-at-a-time" (memory is tight), or "" where not even one fits: it could push the
    engine that serves out of memory. `held_*` is what the serving engine holds, for models that cannot be sized.
    """
    free, form, why = free_memory(), "auto", "both engines fit beside the one that serves"
    for engine, spec in specs.items():
        if spec.url:
            continue
        if spec.gguf.is_dir():
            fit = Fit(spec.kind, "unknown", "a directory of weights has no header that is read", None)
        else:
            hosted = spec.form == "hosted"
            fit = estimate(read_header(spec.gguf), spec.settings, spec.kind, own=spec.own, memory=free, hosted=hosted)
        if fit.verdict == "does not fit":
            return "", f"{engine} does not fit beside the engine that serves: {fit.why}"
        if fit.verdict == "unknown" and not _twice(free, held_bytes, held_vram_bytes):
            return "", f"cannot say whether {engine} fits beside the engine that serves: {fit.why}"
        if fit.verdict != "fits":
            form, why = "one-at-a-time", f"one engine at a time: memory for {engine} is {fit.verdict}: {fit.why}"
    return form, why


def _twice(free: FreeMemory, held_bytes: int | None, held_vram_bytes: int | None) -> bool:
    """Whether twice as much is free as the serving engine holds of each memory."""
    enough = held_bytes is not None and free.ram_bytes is not None and free.ram_bytes > 2 * held_bytes
    if held_vram_bytes is None:
        return enough
    return enough and free.vram_bytes is not None and free.vram_bytes > 2 * held_vram_bytes


def measure_rehearsal(
    open_stage: OpenStage,
    *,
    candidate: str,
    form: str,
    is_attached: bool = False,
    before_kills: Callable[[Stage], dict[str, Any]] = lambda _: {},
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """What each drill showed. One that cannot be carried out is evidence as well: `{"failed": reason}`.

    An attached candidate is never killed: `{"not_possible": reason}`. `before_kills` is what else is measured there.
    """
    say("starting a yard without the candidate")
    try:
        with open_stage(candidate) as stage:
            answer = stage.answer()
            incidents = [incident["what"] for incident in stage.client.status()["incidents"]]
            fallback = stage.route()["fallback"]
        hidden = {**answer, "right": stage.incumbent, "fallback": fallback, "incidents": incidents}
    except SwitchyardError as error:
        hidden = {"failed": str(error).splitlines()[0]}
    evidence: dict[str, Any] = {"form": form, "hidden_candidate": hidden}
    if is_attached:
        refused = {"not_possible": f"not possible for an attached engine: others run {candidate!r}"}
        return {**evidence, "killed_candidate": refused, "fallback": refused}
    say("starting a yard with both engines")
    try:
        with open_stage(None) as stage:
            evidence |= before_kills(stage)
            return evidence | _killed(stage, form, say, incumbent_s=hidden.get("took_s"))
    except SwitchyardError as error:
        failed = {"failed": str(error).splitlines()[0]}
        return {**evidence, "killed_candidate": failed, "fallback": failed}


def judge_rehearsal(evidence: Mapping[str, Any], *, kill_detect_s: float, recover_s: float) -> list[CheckResult]:
    """Each drill served by the right engine, in time: seconds to notice, and seconds until it serves.

    To serve again may take the engine's load, the answer itself and `recover_s` beyond both.
    Evidence `{"not_rehearsed": why}` is INCONCLUSIVE.
    """
    if why := evidence.get("not_rehearsed"):
        return [not_measured(f"rehearsal.{drill}", why) for drill in DRILLS]
    results = [_judge_hidden(evidence["hidden_candidate"])]
    for drill in ("killed_candidate", "fallback"):
        results += _judge_kill(f"rehearsal.{drill}", evidence[drill], kill_detect_s, recover_s)
    return results


def _killed(stage: Stage, form: str, say: Say, *, incumbent_s: float | None) -> dict[str, Any]:
    """Killed with a restart left, and killed again with none. `incumbent_s` is what the incumbent's answer takes."""
    stage.client.order("promote", say, model=stage.model_id, to=stage.candidate, form=form)
    before = stage.answer()
    if before["by"] != stage.candidate:
        raise SwitchyardError(f"the candidate did not serve after its promotion: {before['error'] or before['by']}")
    say(f"killing {stage.candidate}: it should come back")
    first = _kill(stage, stage.candidate, before["took_s"])
    if first["by"] != stage.candidate:
        return {"killed_candidate": first, "fallback": {"failed": "the candidate did not come back to be killed again"}}
    say(f"killing {stage.candidate} again: {stage.incumbent} should take over")
    return {"killed_candidate": first, "fallback": _kill(stage, stage.incumbent, incumbent_s)}


def _kill(stage: Stage, right: str, usual_s: float | None) -> dict[str, Any]:
    """The candidate's process killed; who answers the next request, and how long that took. Times in s.

    `usual_s` is what the same request takes of the right engine when it is up: that is no part of the recovery.
    """
    seen = signal_candidate(stage, signal.SIGKILL, "dead")
    load_s = engine_of(stage.route(), seen["by"])["load_s"] if seen["by"] else None
    return {**seen, "right": right, "usual_s": usual_s, "load_s": load_s}


def signal_candidate(stage: Stage, number: signal.Signals, *states: str) -> dict[str, Any]:
    """The answer to a request after the candidate's process got signal `number`.

    With seconds until the yard noted the candidate in one of `states`, and from there until an engine answered.
    """
    pid = engine_of(stage.route(), stage.candidate)["pid"]
    yard = stage.client.status()["pid"]
    try:
        if pid is None or yard not in [parent.pid for parent in psutil.Process(pid).parents()]:
            raise SwitchyardError(f"{stage.candidate} (pid {pid}) is not a process of the rehearsal's yard")
        hit_at = time.time()
        os.kill(pid, number)
    except (psutil.NoSuchProcess, ProcessLookupError) as error:
        raise SwitchyardError(f"{stage.candidate} (pid {pid}) ended before it could be signalled") from error
    answer = stage.answer()
    answered_at = time.time()
    events = [event for event in stage.client.status()["events"] if event["kind"] == "state" and event["at"] >= hit_at]
    ours = (event for event in events if event.get("engine") == stage.candidate and event["what"].startswith(states))
    noticed_at = next((float(event["at"]) for event in ours), None)
    return {
        **answer,
        "detect_s": None if noticed_at is None else noticed_at - hit_at,
        "recover_s": answered_at - (noticed_at or hit_at) if answer["answered"] else None,
    }


def _judge_hidden(seen: Mapping[str, Any]) -> CheckResult:
    check = "rehearsal.hidden_candidate"
    if broken := seen.get("failed"):
        return CheckResult(check=check, verdict=Verdict.ERROR, why=f"the drill failed: {broken}")
    right = seen["answered"] and seen["by"] == seen["fallback"] == seen["right"]
    incidents = "; ".join(seen["incidents"]) or "no incident was noted"
    who = _who_answered(seen)
    return CheckResult(check=check, verdict=Verdict.PASS if right else Verdict.FAIL, why=f"{who}; {incidents}")


def _judge_kill(check: str, seen: Mapping[str, Any], kill_detect_s: float, recover_s: float) -> list[CheckResult]:
    if why := seen.get("not_possible"):
        return [not_measured(check, why, required=False)]
    if broken := seen.get("failed"):
        return [CheckResult(check=check, verdict=Verdict.ERROR, why=f"the drill failed: {broken}")]
    right = seen["answered"] and seen["by"] == seen["right"]
    who = _who_answered(seen)
    verdict = Verdict.PASS if right else Verdict.FAIL
    served = CheckResult(check=check, verdict=verdict, why=f"{who}; right would be {seen['right']}")
    if not right:
        return [served]
    load_s, usual_s = seen["load_s"] or 0.0, seen["usual_s"] or 0.0
    detect = at_most(f"{check}_detect_s", seen["detect_s"], limit=kill_detect_s, unit="s")
    why = (
        f"{seen['by']} had served {seen['recover_s']:.2f} s after that; its start took {load_s:.2f} s, such an answer "
        f"takes it {usual_s:.2f} s"
    )
    limit_s = load_s + usual_s + recover_s
    recover = at_most(f"{check}_recover_s", seen["recover_s"], limit=limit_s, unit="s", why=why)
    return [served, detect, recover]


def _who_answered(seen: Mapping[str, Any]) -> str:
    return f"{seen['by']} answered" if seen["answered"] else f"no engine answered ({seen['error']})"
