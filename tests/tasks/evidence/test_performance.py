"""Speed: blocks measured against fake engines of known speed, and the verdicts on blocks made up for it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import installed
import pytest
from fake_driver import FakeDriver

from engines.model.header import read_header
from engines.process.process import registered
from engines.process.telemetry import private_bytes, process_tree
from engines.registry import driver as driver_of
from engines.settings import Settings
from tasks.evidence.engine_under_test import Arm, EngineUnderTest
from tasks.evidence.performance import (
    CACHED,
    MAPPED,
    Workload,
    body,
    held_bytes,
    judge_memory,
    judge_noise,
    judge_performance,
    mapped_weights,
    measure_block,
    memory_figures,
    metrics,
    prompt,
    without_caches,
)
from tasks.verdicts.limits import Limits
from tasks.verdicts.noninferiority import block_orders
from tasks.verdicts.verdict import CheckResult, Verdict, gate

LIMITS = Limits(
    ttft_p50_ratio=1.10,
    ttft_p95_ratio=1.20,
    tpot_p50_ratio=1.10,
    e2e_p50_ratio=1.10,
    throughput_ratio=1.10,
    memory_peak_ratio=1.15,
    foreign_cpu=0.10,
)
SMALL = Workload(requests=3, max_tokens=6, prompt_words=16, warmup_min=1, warmup_max=2, seed=3)
ANY_LOAD = 10.0  # a foreign CPU share that no machine reaches: the tests share theirs
PRIMARY = ["ttft_p50", "ttft_p95", "tpot_p50", "e2e_p50"]
SAMPLES = ("ttft_ms", "tpot_ms", "e2e_ms", "prefill_tok_s", "decode_tok_s")


def engine(home: Path, arm: Arm, *habits: str) -> EngineUnderTest:
    """A fake engine as one side of the comparison."""
    driver, gguf = FakeDriver(*habits), home / "m.gguf"
    gguf.write_bytes(b"GGUF")
    return EngineUnderTest(
        arm=arm, driver=driver, installation=driver.find(), model_id="m", gguf=gguf, settings=Settings(), home=home
    )


def measured(home: Path, candidate: tuple[str, ...] = (), *, itl_ms: int = 2, **options: Any) -> dict[str, Any]:
    """One block of a well-behaved incumbent against a candidate with the habits given."""
    workload = options.pop("workload", SMALL)
    options = {"index": 0, "foreign_cpu_limit": ANY_LOAD} | options
    incumbent = engine(home, "incumbent", "--itl-ms", str(itl_ms))
    return measure_block(incumbent, engine(home, "candidate", *candidate), workload, **options)


# --- measuring ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A block with a round at two requests at a time; slow tokens, as a stream read in one go has no TPOT."""
    workload = Workload(**vars(SMALL) | {"concurrency": (1, 2)})
    return measured(tmp_path_factory.mktemp("home"), ("--itl-ms", "30"), itl_ms=30, workload=workload)


def test_a_block_holds_one_sample_of_each_request_for_both_arms(block: dict[str, Any]) -> None:
    """Three requests; the load time, memory and the round at two are one sample each."""
    assert block["void"] is None
    for arm in (block["incumbent"], block["candidate"]):
        assert {name: len(arm[name]) for name in SAMPLES} == dict.fromkeys(SAMPLES, SMALL.requests)
        assert len(arm["records"]) == SMALL.requests
        assert [len(arm[name]) for name in ("memory_peak_mib", "throughput_c2_tok_s")] == [1, 1]
        assert SMALL.warmup_min <= arm["warmup_requests"] <= SMALL.warmup_max
        assert arm["errors"] == []
        assert all(value > 0 for name in SAMPLES for value in arm[name])


def test_a_block_can_be_stored(block: dict[str, Any]) -> None:
    """Plain JSON, unchanged by a round trip."""
    assert json.loads(json.dumps(block, allow_nan=False)) == block


def test_the_prefix_cache_is_probed_beside_the_samples(block: dict[str, Any]) -> None:
    """One prompt twice; not among the measured requests."""
    assert block["candidate"]["prefix_cache"]["cold_ttft_ms"] > 0
    assert block["candidate"]["prefix_cache"]["prompt_tokens"] == 5


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_the_order_of_the_arms_comes_from_the_seed(tmp_path: Path, index: int) -> None:
    """A coin per block: whoever re-runs the plan gets the same orders. An arm that does not start is in it too."""
    lines: list[str] = []
    incumbent = engine(tmp_path, "incumbent", "--exit-code", "1")
    candidate = engine(tmp_path, "candidate", "--exit-code", "1")
    got = measure_block(incumbent, candidate, SMALL, index=index, foreign_cpu_limit=ANY_LOAD, progress=lines.append)
    assert got["order"] == block_orders(4, SMALL.seed)[index]
    names = {"A": "incumbent (fake)", "B": "candidate (fake)"}
    assert lines == [names[letter] for letter in got["order"]]
    assert set(block_orders(20, SMALL.seed)) == {"AB", "BA"}


def test_an_engine_that_does_not_start_has_the_block_discarded(tmp_path: Path) -> None:
    """With its reason; that it failed counts against it all the same."""
    got = measured(tmp_path, ("--exit-code", "3"))
    assert got["void"].startswith("the candidate did not come up: fake ended with exit status 3")
    assert registered(tmp_path) == []
    errors = named(judge_performance([got], LIMITS, SMALL, (3,), client_error_ms={}))["performance.errors"]
    assert (errors.verdict, errors.value) == (Verdict.INCONCLUSIVE, 1)


def test_an_engine_that_dies_in_the_block_has_it_discarded(tmp_path: Path) -> None:
    """Its failed requests are on record."""
    workload = Workload(**vars(SMALL) | {"max_tokens": 40})
    got = measured(tmp_path, ("--itl-ms", "20", "--die-after-s", "1.2"), workload=workload)
    assert "candidate" in got["void"]
    many = [{**got, "index": index} for index in range(3)]
    errors = named(judge_performance(many, LIMITS, workload, (3,), client_error_ms={}))["performance.errors"]
    assert errors.verdict is Verdict.FAIL
    assert registered(tmp_path) == []


def test_a_block_on_a_busy_machine_is_void(tmp_path: Path) -> None:
    """With the share that others used; every share is over a limit below zero."""
    got = measured(tmp_path, foreign_cpu_limit=-1.0)
    if got["foreign_cpu"] == {"incumbent": None, "candidate": None}:
        pytest.skip("this system does not report how much CPU other processes use")
    assert "of the CPU while the" in got["void"]


def test_an_answer_that_came_in_one_go_has_no_speed(tmp_path: Path) -> None:
    """All its chunks bear one time: a TPOT of 0 would be refused by the judge, or pass as the fastest engine of all.

    The client may have been held up, so its requests are repeated once.
    """
    got = measured(tmp_path, ("--one-write",))
    assert (len(got["candidate"]["e2e_ms"]), got["candidate"]["tpot_ms"]) == (2 * SMALL.requests, [])
    results = named(judge_performance([got | {"index": i} for i in range(3)], LIMITS, SMALL, (3,), client_error_ms={}))
    assert results["performance.tpot_p50_ratio"].verdict is Verdict.INCONCLUSIVE


def test_prompts_differ_where_they_must_and_only_there() -> None:
    """The opening defeats prefix caches; the same seed gives both engines the same words."""
    assert prompt(48, "a", 1) == prompt(48, "a", 1)
    assert prompt(48, "a", 1) != prompt(48, "a", 2)
    assert prompt(48, "b", 1).startswith("b: ")
    assert 40 <= len(prompt(48, "a", 1).split()) <= 56
    assert body("x", 5, {"cache_prompt": False}) == {
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 5,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
    }


def test_a_candidate_three_times_as_slow_is_failed_within_three_blocks(tmp_path: Path) -> None:
    """The whole way: real processes, real streams, the real judge."""
    workload = Workload(requests=4, max_tokens=8, prompt_words=16, warmup_min=1, warmup_max=1)
    fast = engine(tmp_path, "incumbent", "--ttft-ms", "5", "--itl-ms", "8")
    slow = engine(tmp_path, "candidate", "--ttft-ms", "5", "--itl-ms", "24")
    blocks = [measure_block(fast, slow, workload, index=i, foreign_cpu_limit=ANY_LOAD) for i in range(3)]
    results = named(judge_performance(blocks, LIMITS, workload, (3,), client_error_ms={}))
    assert results["performance.tpot_p50_ratio"].verdict is Verdict.FAIL
    assert results["performance.e2e_p50_ratio"].verdict is Verdict.FAIL
    assert results["performance.errors"].verdict is Verdict.PASS
    assert gate(results.values()) is Verdict.FAIL


# --- judging ------------------------------------------------------------------------------------------------------


def arm(factor: float, **changes: Any) -> dict[str, Any]:
    """The evidence of one arm, its times `factor` times those of a quick engine."""
    return {
        "load_s": factor,
        "records": [{}] * 5,
        "ttft_ms": [20 * factor * (1 + i / 100) for i in range(5)],
        "tpot_ms": [10 * factor] * 5,
        "e2e_ms": [100 * factor] * 5,
        "prefill_tok_s": [500 / factor] * 5,
        "decode_tok_s": [100 / factor] * 5,
        "throughput_c4_tok_s": [200 / factor],
        "memory_peak_mib": [400 * factor],
        "prefix_cache": {"cold_ttft_ms": 40.0, "cached_ttft_ms": 10.0 * factor},
        "reconciled": [],
        "errors": [],
    } | changes


def made_up(n_blocks: int, factor: float, *, spread: float = 0.01, **changes: Any) -> list[dict[str, Any]]:
    """Blocks in which the candidate is `factor` times as slow, give or take `spread`."""
    return [
        {
            "index": index,
            "order": "AB",
            "incumbent": arm(1.0),
            "candidate": arm(factor * (1 + spread * (-1) ** index), **changes),
            "foreign_cpu": {"incumbent": 0.0, "candidate": 0.0},
            "void": None,
        }
        for index in range(n_blocks)
    ]


def judged(blocks: list[dict[str, Any]], workload: Workload = SMALL, **options: Any) -> dict[str, CheckResult]:
    """The results by name, looked at after six blocks."""
    return named(judge_performance(blocks, LIMITS, workload, (6,), **{"client_error_ms": {}} | options))


def named(results: list[CheckResult]) -> dict[str, CheckResult]:
    assert len({result.check for result in results}) == len(results)
    return {result.check: result for result in results}


@pytest.mark.parametrize(
    ("factor", "spread", "expected"),
    [(1.0, 0.01, Verdict.PASS), (1.5, 0.01, Verdict.FAIL), (1.05, 0.30, Verdict.INCONCLUSIVE)],
)
def test_equal_slower_and_unclear_are_three_verdicts(factor: float, spread: float, expected: Verdict) -> None:
    """For every primary metric."""
    results = judged(made_up(6, factor, spread=spread))
    assert {results[f"performance.{name}_ratio"].verdict for name in PRIMARY} == {expected}
    assert gate(results.values()) is expected


@pytest.mark.parametrize(("failures", "expected"), [(0, Verdict.PASS), (1, Verdict.INCONCLUSIVE), (6, Verdict.FAIL)])
def test_failed_requests_fail_only_where_chance_does_not_explain_them(failures: int, expected: Verdict) -> None:
    """One of sixty on the candidate and none on the incumbent is a coin that fell once."""
    blocks = made_up(6, 1.0)
    for block in blocks:
        block["incumbent"]["records"] = block["candidate"]["records"] = [{}] * 10
    blocks[0]["candidate"]["errors"] = ["timeout"] * failures
    result = judged(blocks)["performance.errors"]
    assert result.verdict is expected
    assert f"{failures} of 60 requests" in result.why


def test_too_few_blocks_decide_nothing() -> None:
    """However alike the engines look in them."""
    assert gate(judged(made_up(5, 1.0)).values()) is Verdict.INCONCLUSIVE


def test_discarded_blocks_do_not_count() -> None:
    """Five of eight are not enough for the look at six."""
    blocks = made_up(8, 1.0)
    for block in blocks[:3]:
        block["void"] = "other processes used 40% of the CPU"
    result = judged(blocks)["performance.ttft_p50_ratio"]
    assert result.verdict is Verdict.INCONCLUSIVE
    assert "3 discarded" in result.why


def test_no_block_is_inconclusive() -> None:
    """And says so under the name that a reader looks for."""
    (result,) = judge_performance([], LIMITS, SMALL, (6,), client_error_ms={})
    assert (result.check, result.verdict) == ("performance.ttft_p50_ratio", Verdict.INCONCLUSIVE)


def test_a_metric_without_samples_is_not_passed() -> None:
    """An absent TTFT is not a TTFT of zero."""
    results = judged(made_up(6, 1.0, ttft_ms=[]))
    assert results["performance.ttft_p50_ratio"].verdict is Verdict.INCONCLUSIVE
    assert results["performance.tpot_p50_ratio"].verdict is Verdict.PASS


def test_a_margin_below_the_clients_own_error_is_not_judged() -> None:
    """10% of 20 ms is 2 ms; a client that errs by 1 ms cannot see that."""
    results = judged(made_up(6, 1.0), client_error_ms={"ttft_ms": 1.0})
    assert results["performance.ttft_p50_ratio"].verdict is Verdict.INCONCLUSIVE
    assert results["performance.e2e_p50_ratio"].verdict is Verdict.PASS


def test_failed_requests_of_the_candidate_fail_it() -> None:
    """However fast it was on the others; as many as the incumbent has are none of its own."""
    failing = judged(made_up(6, 1.0, errors=["http_5xx"]))["performance.errors"]
    assert (failing.verdict, failing.value, failing.limit) == (Verdict.FAIL, 6, 0)
    both = made_up(6, 1.0, errors=["http_5xx"])
    for block in both:
        block["incumbent"]["errors"] = ["http_5xx"]
    assert judged(both)["performance.errors"].verdict is Verdict.PASS


def test_throughput_is_judged_where_the_workload_asks_for_it() -> None:
    """Higher is better there: a ratio over 1 means the candidate is worse all the same."""
    workload = Workload(**vars(SMALL) | {"concurrency": (1, 4)})
    assert [metric.name for metric in metrics(LIMITS, workload)] == [*PRIMARY, "throughput_c4"]
    result = judged(made_up(6, 1.5), workload)["performance.throughput_c4_ratio"]
    assert result.verdict is Verdict.FAIL
    assert result.value == pytest.approx(1.5, rel=0.02)


def test_figures_are_reported_beside_the_gate() -> None:
    """Not required: a slow load does not hold the gate, and what was not measured is said."""
    results = judged(made_up(6, 1.0, load_s=9.0, prefix_cache=None))
    assert (results["performance.load_s"].value, results["performance.load_s"].required) == (9.0, False)
    assert results["performance.prefix_cache_ttft_ratio"].verdict is Verdict.INCONCLUSIVE
    assert results["performance.decode_tok_s"].unit == "tok/s"
    assert gate(results.values()) is Verdict.PASS


def test_where_one_cache_cannot_be_switched_off_both_are_on(tmp_path: Path) -> None:
    """Else what a template begins every prompt with would be free for one engine alone; the report says so."""
    old, new = engine(tmp_path, "incumbent"), engine(tmp_path, "candidate")
    old.driver.neutral_body, new.driver.neutral_body = (lambda: None), (lambda: {"cache_prompt": False})  # type: ignore[method-assign]
    assert without_caches({"incumbent": old, "candidate": new}) == ({"incumbent": {}, "candidate": {}}, ["fake"])
    assert without_caches({"candidate": new}) == ({"candidate": {"cache_prompt": False}}, [])
    result = judged([block | {CACHED: ["ollama"]} for block in made_up(6, 1.0)])["performance.prompt_cache"]
    assert (result.verdict, result.required) == (Verdict.PASS, False)
    assert result.why.startswith("both kept their prompt caches, as that of ollama cannot be switched off")
    assert "performance.prompt_cache" not in judged(made_up(6, 1.0))


def test_disagreeing_accounts_are_reported() -> None:
    """Client, usage and engine timing; not required."""
    account = judged(made_up(6, 1.0, reconciled=["usage says 5, 6 came"]))["performance.accounting"]
    assert (account.verdict, account.value, account.required) == (Verdict.INCONCLUSIVE, 6, False)


@pytest.mark.parametrize(("factor", "expected"), [(1.0, Verdict.PASS), (1.5, Verdict.FAIL)])
def test_memory_is_judged_from_the_same_blocks(factor: float, expected: Verdict) -> None:
    """Peak anonymous memory, block by block."""
    result = judge_memory(made_up(6, factor), LIMITS, (6,))
    assert (result.check, result.verdict, result.limit) == ("memory.peak_ratio", expected, pytest.approx(1.15))


def with_weights(blocks: list[dict[str, Any]], incumbent: int | None, candidate: int | None) -> list[dict[str, Any]]:
    """`blocks` whose engines serve so many MiB of weights from the mapped file."""
    for block in blocks:
        for name, mib in (("incumbent", incumbent), ("candidate", candidate)):
            block[name][MAPPED] = None if mib is None else mib * 2**20
            block[name]["memory_steady_bytes"] = 300 * 2**20
    return blocks


def test_an_engine_of_directories_maps_no_weights(tmp_path: Path) -> None:
    """None would leave the incumbent's mapped file out of the comparison: vLLM came out as 45 times as large."""
    assert mapped_weights(dataclasses.replace(engine(tmp_path, "candidate"), gguf=tmp_path), []) == 0


def test_mapped_weights_count_once_for_each_engine() -> None:
    """400 MiB with 1000 mapped beside it against 1400 private: alike, whatever a private comparison says."""
    blocks = with_weights(made_up(6, 3.5), 1000, 0)
    result = judge_memory(blocks, LIMITS, (6,))
    assert (result.verdict, result.value) == (Verdict.PASS, pytest.approx(1.0, abs=0.02))
    assert "judged: private memory + weights mapped from the file" in result.why
    assert "candidate 1,400 + 0 MiB; incumbent 400 + 1,000 MiB" in result.why
    both = memory_figures(blocks, {"incumbent": "none", "candidate": "none"}).why
    assert "weights mapped from the file: 0 B against 1,000.0 MiB" in both
    assert held_bytes(blocks[0]["incumbent"]) == 1300 * 2**20


@pytest.mark.parametrize("unknown", ["incumbent", "candidate"])
def test_without_both_kinds_on_both_sides_private_memory_is_judged(unknown: str) -> None:
    """Never one kind against another; and the reason says so. A discarded block does not count."""
    mapped: dict[str, int | None] = {"incumbent": 1000, "candidate": 1000} | {unknown: None}
    result = judge_memory(with_weights(made_up(6, 1.5), **mapped), LIMITS, (6,))
    assert (result.verdict, result.value) == (Verdict.FAIL, pytest.approx(1.5, abs=0.02))
    assert "judged: private memory alone" in result.why
    blocks = [*with_weights(made_up(6, 1.5), 1000, 1000), *made_up(1, 1.5)]
    blocks[-1] |= {"index": 6, "void": "other processes used 40% of the CPU"}
    assert "weights mapped" in judge_memory(blocks, LIMITS, (6,)).why


def test_what_an_engine_held_is_never_half_of_it() -> None:
    """It corrects the next estimate: private and mapped, or what earlier versions recorded."""
    assert held_bytes({"memory_steady_bytes": 3, MAPPED: 0}) == 3
    assert held_bytes({"memory_steady_bytes": 3, MAPPED: None}) is None
    assert held_bytes({"memory_steady_bytes": 3, "pss_bytes": 5}) == 5


@pytest.mark.engine
@pytest.mark.parametrize("name", ["llama.cpp", "mistral.rs"])
def test_weights_of_a_real_engine_count_once(tmp_path: Path, name: str) -> None:
    """llama-server serves them from the mapped file, mistral.rs from a copy although it maps the file as well."""
    gguf, driver = installed.smollm2(*installed.BOTH), driver_of(name)
    one = EngineUnderTest(
        arm="incumbent",
        driver=driver,
        installation=driver.find(),
        model_id="m",
        gguf=gguf,
        settings=Settings(context_tokens=1024, gpu_layers=0),
        home=tmp_path,
    )
    weights = read_header(gguf).tensor_bytes
    with one.up() as served:
        tree = process_tree(served.process.pid)
        found, private = mapped_weights(one, tree), private_bytes(tree)
    assert found == pytest.approx(weights if name == "llama.cpp" else 0, rel=0.02)
    assert private is not None
    assert (private > weights) == (name == "mistral.rs")


@pytest.mark.parametrize(
    ("factor", "spread", "expected"),
    [(1.0, 0.005, Verdict.PASS), (1.0, 0.30, Verdict.INCONCLUSIVE), (1.5, 0.005, Verdict.FAIL)],
)
def test_the_machines_own_noise_is_reported(factor: float, spread: float, expected: Verdict) -> None:
    """The incumbent against itself: a difference there is the bench's."""
    results = judge_noise(made_up(6, factor, spread=spread), LIMITS, SMALL, (6, 12, 24), client_error_ms={})
    assert {result.verdict for result in results} == {expected}
    assert [result.check for result in results] == [f"calibration.{name}" for name in PRIMARY]
    assert not any(result.required for result in results)
