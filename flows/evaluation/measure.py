"""The measurements of one model: each function gathers one kind of evidence, unless the records have it already."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from engines.errors import BadInput, EngineExited, EngineNotFound
from engines.fit import FORMULAS
from engines.home import home
from engines.model.header import read_header
from engines.process.attached import NO_PID
from engines.process.readiness import exit_reason
from engines.process.serving import Served
from engines.settings import NO_FILE, Endpoint
from engines.units import number_of
from engines.yard.usage import Usage
from flows.evaluation.judge import required_behaviours, settled, tool_batches
from flows.evaluation.trial import ARMS, BOTH, Trial, Unmeasured
from flows.progress import progress
from migrations.carried import no_chat
from tasks.evidence import compatibility as behaviours
from tasks.evidence import preflight as headers
from tasks.evidence.behaviours.battery import BEHAVIOURS
from tasks.evidence.engine_under_test import Arm, EngineUnderTest, ends_within
from tasks.evidence.faults import measure_faults
from tasks.evidence.first_look import measure_pairs, timed_request
from tasks.evidence.parity.answers import measure_answers, measure_floor
from tasks.evidence.parity.parameters import measure_ignored_parameters
from tasks.evidence.parity.tokens import measure_prompt_tokens
from tasks.evidence.performance import held_bytes, measure_block, metrics, without_caches
from tasks.evidence.prompts import Prompt, load_prompts, load_transcripts
from tasks.evidence.tool_calls.judge import KIND as TOOL_CALLS
from tasks.evidence.tool_calls.judge import calls_settled
from tasks.evidence.tool_calls.measure import measure_tool_calls, tools_hidden
from tasks.evidence.tool_calls.prompts import chosen_prompts, tool_looks
from tasks.evidence.unmeasured import LAUNCH, summary
from tasks.verdicts.noninferiority import decision_reached
from tasks.verdicts.verdict import Verdict

FIRST_PROMPTS, FIRST_TOKENS = 3, 16  # of the first look
FLOOR_SHARE = 12  # one prompt in so many also measures the engine's own noise
FLOOR_TOKENS = 16
REQUIRED_PROMPTS = 12  # asked with `tool_choice` required, where no model calls a tool by itself
DYING_S = 5.0  # a dying engine closes its connections first
# what an evaluation has whole needs no first look: one that was broken off before there was such a look has it
WHOLE = {"parity.first_tokens": "parity.tokens", "parity.first_answers": "parity.answers", "smoke": "compatibility"}


def preflight(trial: Trial) -> None:
    """Read the GGUF header: loads, fits, alternatives. A file that cannot be read fails its model alone."""
    verdict = Verdict.FAIL
    try:
        if trial.model.gguf != NO_FILE:
            read_header(trial.model.gguf)
        verdict = Verdict.ERROR  # of what its header says: the plan itself was checked before the run
        if other := no_chat(trial.plan, trial.model.id):
            raise BadInput(other)
        if trial.model.gguf != NO_FILE:
            trial.gather(BOTH, "preflight", partial(_preflight_report, trial))
        if used := Usage(home()).fields:
            trial.gather(BOTH, "fields", partial(_fields, trial, used))
    except BadInput as error:
        trial.put_unmeasured(BOTH, "preflight", {"verdict": verdict.value, "why": str(error), "log": []})
        raise Unmeasured(str(error)) from error


def _fields(trial: Trial, used: Mapping[str, int]) -> Any:
    """The request fields that clients of the yard here send, and those of them that each engine does not act on."""
    ignores = {arm: engine.driver.dialect(engine.installation).ignores for arm, engine in trial.engines.items()}
    return {"used": used, "ignored": {arm: sorted(names & used.keys()) for arm, names in ignores.items()}}


def _preflight_report(trial: Trial) -> Any:
    architecture = read_header(trial.model.gguf).architecture
    kinds = {engine.name: engine.driver.name for engine in trial.engines.values()}
    learned = {one.name: trial.records.correction(_build(one), architecture) for one in trial.engines.values()}
    report = headers.preflight(
        [(trial.model.id, trial.model.gguf)],
        settings_by_model={trial.model.id: trial.engines["incumbent"].settings},
        own_args={(trial.model.id, engine.name): engine.own for engine in trial.engines.values()},
        engines=kinds,
        versions={engine.name: engine.installation.version for engine in trial.engines.values()},
        hosted={engine.name for engine in trial.engines.values() if engine.installation.form == "hosted"},
        corrections={(trial.model.id, name): found.ratio for name, found in learned.items() if found is not None},
    )
    return report["models"][0]


def _build(engine: EngineUnderTest) -> str:
    """Kind, version and formulas, by which the measured memory of an engine corrects its next estimate."""
    return f"{engine.driver.name} {engine.installation.version}, estimate {FORMULAS}"


def prompt_tokens(trial: Trial, arm: Arm) -> None:
    """How many tokens each prompt is to this engine."""
    prompts = _prompts(trial)
    wanted = {"parity.tokens": lambda e: measure_prompt_tokens(e, prompts, progress=trial.say)}
    _gather_served(trial, arm, wanted)


def first_answers(trial: Trial, arm: Arm) -> None:
    """The tokens of the shortest prompts, then a short answer to each: another tokenizer and garbage show at once."""
    plain = [one for one in _prompts(trial) if not one.tools]
    few = sorted(plain, key=lambda one: len(str(one.messages)))[:FIRST_PROMPTS]
    ask = partial(measure_answers, max_tokens=FIRST_TOKENS, top_logprobs=trial.plan.measure.top_logprobs)
    wanted = {
        "parity.first_tokens": lambda e: measure_prompt_tokens(e, few, progress=trial.say),
        "parity.first_answers": lambda e: ask(e, few, progress=trial.say),
    }
    _gather_served(trial, arm, wanted, enough=partial(settled, trial))


def smoke(trial: Trial, arm: Arm) -> None:
    """The first required behaviour of each group."""
    first = {BEHAVIOURS[name].group: name for name in sorted(required_behaviours(trial.plan), reverse=True)}
    names = sorted(first.values())
    wanted = {"smoke": lambda e: behaviours.measure_compatibility(e, names=names, progress=trial.say)}
    _gather_served(trial, arm, wanted)


def pairs(trial: Trial) -> None:
    """A few timed requests to both engines in turns."""

    neutral, _ = without_caches(trial.engines)

    def ask(arm: Arm, number: int) -> dict[str, Any]:
        return timed_request(trial.running.get(arm).endpoint, trial.workload, neutral[arm], number)

    if trial.payloads(BOTH, "performance"):
        return
    measured = partial(measure_pairs, partial(ask, "incumbent"), partial(ask, "candidate"), trial.plan.limits)
    engines = [trial.untimed(arm) for arm in ARMS]
    trial.gather(BOTH, "first_look", lambda: measured(in_turns=trial.fits_together), engines=engines)


def answers(trial: Trial, arm: Arm) -> None:
    """Greedy answers with logprobs, and the engine's own noise."""
    amounts, prompts = trial.plan.measure, _prompts(trial)
    noisy = prompts[: max(2, len(prompts) // FLOOR_SHARE)]
    floor_tokens = min(FLOOR_TOKENS, amounts.parity_tokens)
    ask: dict[str, Any] = {"top_logprobs": amounts.top_logprobs, "progress": trial.say}
    wanted = {
        "parity.answers": lambda e: measure_answers(e, prompts, max_tokens=amounts.parity_tokens, **ask),
        "parity.floor": lambda e: measure_floor(e, noisy, max_tokens=floor_tokens, **ask),
    }
    _gather_served(trial, arm, wanted)


def _prompts(trial: Trial) -> list[Prompt]:
    return [*_own_prompts(trial), *load_prompts(trial.plan.measure.parity_prompts)]


def _own_prompts(trial: Trial) -> list[Prompt]:
    return load_transcripts(trial.model.transcripts) if trial.model.transcripts else []


def compatibility(trial: Trial, arm: Arm) -> None:
    """The battery of API behaviours, and the effect of parameters beyond OpenAI's."""
    names = None if trial.plan.measure.every_behaviour else sorted(required_behaviours(trial.plan))
    wanted = {
        "compatibility": lambda e: behaviours.measure_compatibility(e, names=names, progress=trial.say),
        "parity.parameters": lambda e: measure_ignored_parameters(e, progress=trial.say),
    }
    _gather_served(trial, arm, wanted)


def tool_calls(trial: Trial) -> None:
    """Both engines' calls to the prompts with tools, look by look until both numbers are settled.

    Nothing more is asked where no tool reaches the incumbent's model; where neither engine calls one by itself, a few
    prompts are asked again with the demand for a call.
    """
    prompts = chosen_prompts(_own_prompts(trial), trial.plan.measure.tool_prompts)
    looks = tool_looks(len(prompts))
    for number, (start, end) in enumerate(zip((0, *looks), looks, strict=False)):
        # the engine that answered last goes on: only one may be up
        for arm in ARMS[:: -1 if number % 2 else 1]:
            _tool_batch(trial, arm, str(number), prompts[start:end], looks)
            if any(batch["hidden"] for batch in tool_batches(trial)):
                return
        if calls_settled(tool_batches(trial), trial.plan.limits):
            break
    answers = [one for batch in tool_batches(trial) for arm in ARMS for one in batch[arm]]
    if answers and not any(one["calls"] for one in answers):
        in_need = [prompt for prompt in prompts if prompt.group != "none"]
        for arm in ARMS:
            _tool_batch(trial, arm, "required", in_need[:REQUIRED_PROMPTS], looks)


def _tool_batch(trial: Trial, arm: Arm, batch: str, prompts: Sequence[Prompt], looks: Sequence[int]) -> None:
    """One engine's answers to `prompts`; the incumbent answers twice, for its distance from itself."""
    required, incumbent = batch == "required", arm == "incumbent"

    def asked(endpoint: Endpoint) -> dict[str, Any]:
        hidden = tools_hidden(endpoint) if incumbent and batch == "0" else None
        found: dict[str, Any] = {"batch": batch, "looks": list(looks), "required": required, "hidden": hidden}
        if hidden:
            return found | {"answers": [], "again": []}
        repeat = incumbent and not required
        return found | measure_tool_calls(endpoint, prompts, required=required, repeat=repeat, progress=trial.say)

    _gather_served(trial, arm, {TOOL_CALLS: asked}, key=batch)


def calibration(trial: Trial) -> None:
    """The incumbent against itself: this machine's own noise."""
    wanted, incumbent = trial.plan.measure.calibration_blocks, trial.engines["incumbent"]
    for index in range(wanted):
        _block(trial, "calibration", incumbent, incumbent, index, wanted)


def performance(trial: Trial) -> None:
    """Paired blocks until a look decides; discarded blocks are repeated, within the plan's allowance, and counted."""
    amounts, known = trial.plan.measure, trial.client_errors
    compared = metrics(trial.plan.limits, trial.workload)
    errors = {metric.name: known[metric.key] for metric in compared if metric.key in known}
    incumbent, candidate = (trial.engines[arm] for arm in ARMS)
    blocks: list[dict[str, Any]] = []
    for index in range(amounts.looks[-1] + amounts.max_discarded_blocks):
        n_discarded = sum(block["void"] is not None for block in blocks)
        _block(trial, "performance", incumbent, candidate, index, amounts.looks[-1] + n_discarded)
        blocks = trial.payloads(BOTH, "performance")
        decision = decision_reached(compared, blocks, amounts.looks, client_errors=errors)
        if decision.stop:
            trial.say(f"speed: {decision.why}")
            break
    else:
        n_discarded = sum(block["void"] is not None for block in blocks)
        fix = "quiet the machine, or raise measure.max_discarded_blocks"
        progress.get().note(
            f"{trial.model.id}: {number_of(n_discarded, 'block')} were discarded, no more are repeated; {fix}"
        )
    # measured against estimated memory of each engine, for the next preflight
    report = trial.payload(BOTH, "preflight")
    for arm in ARMS if report is not None else ():
        engine = trial.engines[arm]
        ratio = headers.measured_over_estimated(report, engine.name, [held_bytes(block[arm]) for block in blocks])
        if ratio is not None:
            trial.records.learn_correction(_build(engine), report["architecture"], ratio)


def _block(
    trial: Trial, kind: str, incumbent: EngineUnderTest, candidate: EngineUnderTest, index: int, wanted: int
) -> None:
    name = f"{kind} block {index + 1} of {wanted}"

    def measured() -> dict[str, Any]:
        block = measure_block(
            incumbent,
            candidate,
            trial.workload,
            index=index,
            foreign_cpu_limit=trial.plan.limits.foreign_cpu,
            progress=lambda what: trial.say(f"{name}: {what}"),
        )
        if block["void"]:
            progress.get().note(f"{trial.model.id}: {name} was discarded: {block['void']}")
        return block

    trial.gather(BOTH, kind, measured, key=f"{index:05d}")


def faults(trial: Trial) -> None:
    """Drills on the candidate: killed, frozen, cut model file, taken port. Behind a yard, that one is rehearsed."""
    if not (trial.behind_yards or trial.is_attached("candidate")):
        trial.gather("candidate", "faults", lambda: measure_faults(trial.engines["candidate"], trial.say))


# --- an engine that serves while it is measured


def _gather_served(
    trial: Trial,
    arm: Arm,
    measures: Mapping[str, Callable[[Endpoint], Any]],
    enough: Callable[[], bool] = lambda: False,
    *,
    key: str = "",
) -> None:
    """Several kinds of evidence from an engine that is up, until it is `enough`; none where the records have them all.

    A kind that breaks off does not take the others along.
    """
    missing = {
        kind: measure
        for kind, measure in measures.items()
        if not (trial.has(arm, kind, key) or trial.has(arm, WHOLE.get(kind, kind), key))
    }
    if not missing:
        return
    try:
        served = trial.running.get(arm)
    except Exception as error:
        trial.broke(arm, LAUNCH, error)
        raise Unmeasured(summary(error)) from error
    if trial.engines[arm].settings.gpu_layers and (device := served.device) is not None:
        trial.gather(arm, "device", lambda: vars(device))
    failed: list[Exception] = []
    for kind, measure in missing.items():
        if enough():
            break
        try:
            _require_alive(served)
            trial.gather(arm, kind, partial(_while_alive, served, measure), key=key, engines=(trial.untimed(arm),))
        except Exception as error:
            trial.broke(arm, kind, error)
            failed.append(error)
    if failed:
        raise Unmeasured(summary(failed[0])) from failed[0]


def _while_alive(served: Served, measure: Callable[[Endpoint], Any]) -> Any:
    """What `measure` returns of an engine that lives; raises EngineExited with its last lines where it died meanwhile.

    A measurement takes refused connections for answers, so a death is looked for behind it as well.
    """
    try:
        payload = measure(served.endpoint)
    except Exception:
        ends_within(served, DYING_S)
        _require_alive(served)
        raise
    address = urlsplit(served.endpoint.base_url)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname, port), timeout=DYING_S).close()
    except OSError as error:
        if served.process.pid == NO_PID:
            why = f"{served.endpoint.engine}: nothing answers at {served.endpoint.base_url} any more: {error}"
            raise EngineNotFound(why, engine=served.endpoint.engine) from error
        ends_within(served, DYING_S)
    _require_alive(served)
    return payload


def _require_alive(served: Served) -> None:
    returncode = served.process.poll()
    if returncode is not None:
        raise EngineExited(
            f"{served.endpoint.engine} ended with {exit_reason(served.process)} while it was measured",
            returncode=returncode,
            engine=served.endpoint.engine,
            log_tail=served.process.log_tail(),
        )
