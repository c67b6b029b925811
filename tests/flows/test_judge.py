"""Verdicts of a first look, from its records alone."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gguf_files import LLAMA, write_gguf
from openai_stub import MODEL, stub

from engines.driver import Installation
from engines.errors import EngineExited, EngineNotFound
from engines.model.free_memory import FreeMemory
from engines.model.memory import GIB
from engines.process import process
from engines.settings import Endpoint
from flows.evaluation import measure, rejudge
from flows.evaluation.judge import judged, settled
from flows.evaluation.outcome import judge
from flows.evaluation.trial import ARMS, BOTH, Bench, Trial
from migrations.llama_cpp_to_mistral_rs import plan_for
from migrations.plan import EngineChoice, ModelPlan
from tasks.evidence.preflight import preflight
from tasks.records.store import Records, open_records
from tasks.records.tables import Evidence
from tasks.verdicts.verdict import Verdict

NAMES = {"incumbent": "llama.cpp", "candidate": "mistral.rs"}


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    with open_records(tmp_path / "switchyard.db") as opened:
        yield opened


def bench(folder: Path, records: Records) -> Bench:
    """A run of llama.cpp against mistral.rs, of which nothing is recorded yet; no engine is started."""
    plan = plan_for([ModelPlan(id="m", gguf=write_gguf(folder / "m.gguf", keys=LLAMA))])
    return Bench(
        plan=plan,
        records=records,
        run_id=records.start_run("evaluate", plan.name, plan.model_dump(mode="json")).id,
        home=folder,
        installations={arm: Installation(NAMES[arm], "hosted", (sys.executable,), "1.0") for arm in ARMS},
        error_budget={"ttft_error_p99_ms": 0.1, "tpot_error_percent": 0.1},
    )


def first_look(trial: Trial, *, times: float) -> None:
    """The evidence of a candidate that answers like the incumbent, so many times as slow."""
    slow = write_gguf(trial.model.gguf.with_name("slow.gguf"), tensors={"a.weight": "Q4_1", "b.weight": "F32"})
    files = [("m", trial.model.gguf), ("slow", slow)]
    engines = {name: name for name in NAMES.values()}
    report, other = preflight(files, engines=engines, memory=FreeMemory(ram_bytes=512 * GIB))["models"]
    for entry, of in zip(report["engines"], other["engines"], strict=True):
        entry["slow"] = of["slow"]
    trial.put(BOTH, "preflight", {**report, "header": other["header"]})
    counted = {"tokens": 5, "error": None, "tools_shown": None}
    position = ["a", -0.1, None, [["a", -0.1, None], ["b", -3.0, None]]]
    answer: dict[str, Any] = {
        "id": "p",
        "prompt": "Why?",
        "text": "a",
        "reasoning": "",
        "tool_calls": [],
        "finish_reason": "length",
    }
    answer |= {
        "finish_reason": "length",
        "prompt_tokens": 5,
        "completion_tokens": 1,
        "positions": [position],
        "error": None,
    }
    for arm in ARMS:
        trial.put(arm, "parity.first_tokens", {"prompts": {"p": counted}, "raw": []})
        trial.put(arm, "parity.first_answers", {"answers": [answer]})
    speed = {"ttft_ms": 100.0, "tpot_ms": 10.0, "e2e_ms": 200.0}
    pairs = [{"incumbent": speed, "candidate": {key: value * times for key, value in speed.items()}}] * 5
    trial.put(BOTH, "first_look", pairs, engines=[trial.untimed(arm) for arm in ARMS])


def test_a_slow_candidate_fails_for_the_quant_it_was_measured_on(tmp_path: Path, records: Records) -> None:
    """With the threads it had, and another quant to evaluate; what few answers leave open holds nothing."""
    run = bench(tmp_path, records)
    trial = Trial(run, run.plan.models[0])
    first_look(trial, times=11)
    found = {result.check: result for result in judged(trial)}
    threads = os.cpu_count() or 1
    on = f"(Q4_1 weights, {threads} thread{'s' * (threads > 1)}, CPU)"
    assert found["performance.first_look"].verdict is Verdict.FAIL
    assert found["performance.first_look"].why.endswith(on)
    left = "not measured: performance.first_look failed first, and the gate cannot open any more"
    assert (found["parity.answers"].why, found["parity.answers"].required) == (left, True)
    still = {name for name, one in found.items() if one.required and one.verdict is Verdict.INCONCLUSIVE}
    assert not any(found[name].why != left for name in still)
    assert "parity.mean_kld" in found
    (model,) = judge(run, [trial])["models"]
    assert f"`switchyard requantize {trial.model.gguf} --to F16`" in model["another_quant"]


def test_an_engine_may_load_as_long_as_in_the_yard(tmp_path: Path, records: Records) -> None:
    run = bench(tmp_path, records)
    plan = run.plan.model_copy(update={"yard": run.plan.yard.model_copy(update={"load_stall_s": 900.0})})
    trial = Trial(replace(run, plan=plan), plan.models[0])
    assert {trial.untimed(arm).stall_s for arm in ARMS} == {900.0}


def test_more_memory_than_the_limit_allows_settles_it_before_anything_starts(tmp_path: Path, records: Records) -> None:
    """By the estimates alone."""
    run = bench(tmp_path, records)
    trial = Trial(run, run.plan.models[0])
    (report,) = preflight(
        [("m", trial.model.gguf)],
        engines={name: name for name in NAMES.values()},
        memory=FreeMemory(ram_bytes=512 * GIB),
    )["models"]
    for entry in report["engines"]:
        if entry["engine"] == NAMES["candidate"]:
            entry["fit"]["needs"][0]["low"] = 100 * GIB
    trial.put(BOTH, "preflight", report)
    assert settled(trial)
    found = {result.check: result for result in judged(trial)}
    assert found["memory.estimate"].verdict is Verdict.FAIL


def test_evidence_is_read_once_and_what_is_stored_is_added(
    tmp_path: Path, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A judgement at each step of an evaluation reads no payload again; one from the records is the same."""
    run = bench(tmp_path, records)
    trial = Trial(run, run.plan.models[0])
    assert trial.payload(BOTH, "first_look") is None
    first_look(trial, times=1)
    again = Trial(run, run.plan.models[0])
    assert judged(again) == judged(trial)
    with monkeypatch.context() as patched:
        patched.setattr(Records, "list_evidence", lambda *_, **__: pytest.fail("the records are read again"))
        assert not settled(trial)
    trial.put_unmeasured("candidate", "launch", {"verdict": "FAIL", "why": "no such file", "log": []})
    assert settled(trial)
    trial.forget_unmeasured()
    assert trial.unmeasured() == Trial(run, run.plan.models[0]).unmeasured()


# what is measured of a first look


def test_no_answers_are_asked_of_an_engine_that_reads_other_tokens(
    tmp_path: Path, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate cannot open any more, and a slow engine takes seconds for each of them."""
    asked: list[str] = []

    def tokens(endpoint: Endpoint, *_: Any, **__: Any) -> dict[str, Any]:
        counted = {"tokens": len(endpoint.engine), "error": None, "tools_shown": None, "preview": "Why?"}
        return {"prompts": {"p": counted}, "raw": []}

    def answers(endpoint: Endpoint, *_: Any, **__: Any) -> dict[str, Any]:
        asked.append(endpoint.engine)
        return {"answers": []}

    monkeypatch.setattr(measure, "measure_prompt_tokens", tokens)
    monkeypatch.setattr(measure, "measure_answers", answers)
    run = bench(tmp_path, records)
    trial = Trial(run, run.plan.models[0])
    with stub() as url:
        for arm in ARMS:
            endpoint = Endpoint(base_url=url, model_id=MODEL, engine=NAMES[arm])
            served: Any = SimpleNamespace(endpoint=endpoint, process=SimpleNamespace(pid=1, poll=lambda: None))
            trial.running = SimpleNamespace(get=lambda _, served=served: served)  # type: ignore[assignment]
            measure.first_answers(trial, arm)
    found = {result.check: result.verdict for result in judged(trial)}
    assert found["parity.prompt_tokens"] is Verdict.FAIL, found
    assert asked == [NAMES["incumbent"]]


def test_an_engine_that_ends_because_we_leave_is_no_finding(
    tmp_path: Path, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Ctrl-C that a library swallowed ends the engines under the work: that is no FAIL, which a resume would keep."""
    run = bench(tmp_path, records)
    trial = Trial(run, run.plan.models[0])
    leaving = threading.Event()
    monkeypatch.setattr(process, "LEAVING", leaving, raising=False)
    died = EngineExited("it ended with signal SIGKILL", returncode=-9)
    leaving.set()
    with pytest.raises(KeyboardInterrupt):
        trial.broke("candidate", "smoke", died)
    assert trial.unmeasured() == []
    leaving.clear()
    trial.broke("candidate", "smoke", died)
    assert [record["verdict"] for _, _, record in trial.unmeasured()] == ["FAIL"]


def test_a_resumed_run_looks_at_nothing_first_that_it_has_whole(tmp_path: Path, records: Records) -> None:
    """One that was broken off before there was a first look: no engine is started for it."""
    run = bench(tmp_path, records)
    trial = Trial(run, run.plan.models[0])
    trial.running = SimpleNamespace(get=lambda _: pytest.fail("an engine is started"))  # type: ignore[assignment]
    trial.put(BOTH, "performance", {}, key="00000")
    for arm in ARMS:
        for kind in ("parity.tokens", "parity.answers", "compatibility"):
            trial.put(arm, kind, {"prompts": {}, "answers": []})
        measure.first_answers(trial, arm)
        measure.smoke(trial, arm)
    measure.pairs(trial)
    assert not any("first" in kind or kind == "smoke" for _, kind, _ in trial._recorded)


def test_models_that_call_no_tool_are_asked_a_third_and_then_required(tmp_path: Path, records: Records) -> None:
    """A resumed run measures nothing twice, and the same verdicts come from the records."""
    run = bench(tmp_path, records)
    trial: Any = Trial(run, run.plan.models[0])
    asked: list[str] = []
    with stub("needs no key") as base_url:
        alive: Any = SimpleNamespace(pid=1, poll=lambda: None)
        endpoint = Endpoint(base_url=base_url, model_id=MODEL, engine="stub")
        served = SimpleNamespace(process=alive, endpoint=endpoint)
        trial.running = SimpleNamespace(get=lambda arm: asked.append(arm) or served)
        measure.tool_calls(trial)
        measure.tool_calls(trial)
    assert asked == ["incumbent", "candidate", "incumbent", "candidate"]
    batches = {one["batch"]: one for one in trial.payloads("incumbent", "parity.tool_calls")}
    assert {key: (len(one["answers"]), len(one["again"])) for key, one in batches.items()} == {
        "0": (20, 20),
        "required": (12, 0),
    }
    found = {one.check: one for one in judged(Trial(run, run.plan.models[0]))}
    trigger, schema = found["parity.trigger_similarity"], found["parity.schema_accuracy"]
    assert (trigger.verdict, trigger.required) == (Verdict.INCONCLUSIVE, False)
    assert trigger.why.startswith("0 calls by both engines on 20 prompts")
    assert schema.why.startswith("with tool_choice required, 12 prompts")
    assert not schema.required


def test_a_template_without_tools_ends_the_asking(tmp_path: Path, records: Records) -> None:
    run = bench(tmp_path, records)
    trial: Any = Trial(run, run.plan.models[0])
    with stub("needs no key", "drops tools") as base_url:
        alive: Any = SimpleNamespace(pid=1, poll=lambda: None)
        endpoint = Endpoint(base_url=base_url, model_id=MODEL, engine="stub")
        trial.running = SimpleNamespace(get=lambda _: SimpleNamespace(process=alive, endpoint=endpoint))
        measure.tool_calls(trial)
    assert not trial.payloads("candidate", "parity.tool_calls")
    found = {one.check: one for one in judged(trial)}
    assert found["parity.trigger_similarity"].why.endswith("the chat template shows no tools to the model")


def test_a_report_needs_no_engine_that_is_retired(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is described as the run recorded it; without a record there is nothing to describe."""

    def gone(*_: object, **__: object) -> Installation:
        raise EngineNotFound("llama.cpp was not found", engine="llama.cpp")

    monkeypatch.setattr(EngineChoice, "find", gone)
    choice = EngineChoice(engine="llama.cpp", name="old")
    engine = {"arm": "incumbent", "form": "binary", "version": "b1", "where": "/opt/llama-server", "build": "d1"}
    recorded = [Evidence(environment=None), Evidence(environment={"engines": [engine]})]
    found = rejudge._described(choice, lambda: recorded, "incumbent")
    assert (found.engine, found.kind, found.version, found.where) == ("old", "llama.cpp", "b1", "/opt/llama-server")
    with pytest.raises(EngineNotFound):
        rejudge._described(choice, lambda: recorded, "candidate")
