"""Models come into memory with their first request and go when unused, or when another one needs the room."""

import concurrent.futures
from types import SimpleNamespace

import pytest
from gguf_files import write_gguf
from waiting import until

from engines.model.header import read_header
from engines.settings import EngineArgs, Settings
from engines.yard.engine.launch_spec import LaunchSpec
from engines.yard.memory_budget import needed_bytes

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
LARGE = "--hold-mib 64"  # with its interpreter less than 100 MiB; two of them are more


def ask(yard, model, **more):
    with yard.http() as http:
        return http.post("/v1/chat/completions", json={**CHAT, "model": model, **more})


def loaded(yard):
    return {model["id"] for model in yard.orders.status()["models"] if not model["dormant"]}


def test_a_model_on_demand_is_loaded_by_its_first_request(start_yard):
    yard = start_yard(load="demand", models="a,b").ready()
    assert yard.engines_left() == []
    with yard.http() as http:
        health = http.get("/health", params={"model": "b"})
        assert (health.status_code, health.json()["state"]) == (200, "unloaded")
        props = http.get("/props", params={"model": "b"})
        assert props.json()["default_generation_settings"]["n_ctx"] == 1024, "4096 tokens for 4 sequences"
        assert yard.engines_left() == []
    assert ask(yard, "b").status_code == 200
    assert loaded(yard) == {"b"}
    assert len(yard.engines_left()) == 1


def test_many_first_requests_load_it_once(start_yard):
    yard = start_yard(load="demand", old="--load-s 0.5", models="a,b").ready()
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda number: ask(yard, "ab"[number % 2]).status_code, range(12)))
    assert answers == [200] * 12
    assert [yard.engine("old", model)["restarts"] for model in "ab"] == [0, 0]
    assert yard.said().count("one real token") == 2


def test_an_unloaded_model_gives_its_memory_back_and_comes_again(start_yard):
    yard = start_yard(models="a,b").ready()
    until(lambda: loaded(yard) == {"a", "b"} and len(yard.engines_left()) == 2, "both to be loaded")
    told = yard.orders.order("unload", model="a")
    assert "of RAM are back" in told
    assert loaded(yard) == {"b"}
    assert len(yard.engines_left()) == 1
    assert ask(yard, "a").status_code == 200
    assert loaded(yard) == {"a", "b"}
    assert "loaded: old" in yard.orders.order("load", model="a")


def test_unloading_lets_requests_end(start_yard):
    yard = start_yard(old="--itl-ms 50", models="a").ready()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, yard, "a", max_tokens=20)
        until(lambda: yard.engine("old", "a")["in_flight"] == 1, "the request on the engine")
        yard.orders.order("unload", model="a")
        assert running.result().status_code == 200


def test_past_the_budget_the_model_used_longest_ago_goes(start_yard):
    yard = start_yard(old=LARGE, load="demand", models="a,b,c", settings={"memory_budget_mib": 200}).ready()
    for model in "ab":
        assert ask(yard, model).status_code == 200
    until(lambda: all(yard.engine("old", model)["memory_bytes"] for model in "ab"), "both to be weighed")
    assert ask(yard, "c").status_code == 200
    until(lambda: loaded(yard) == {"b", "c"}, "the first one to be gone")
    assert ask(yard, "a").status_code == 200, "its need is known now: room is made before it is loaded"
    until(lambda: loaded(yard) == {"a", "c"}, "the second one to be gone")
    assert "needs the room" in yard.said()


def test_two_models_that_take_turns_in_the_room_of_one_fail_nothing(start_yard):
    yard = start_yard(old=LARGE, load="demand", models="a,b", settings={"memory_budget_mib": 120}).ready()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda number: ask(yard, "ab"[number % 2]).status_code, range(16)))
    assert answers == [200] * 16


def test_a_pinned_model_stays_and_the_other_is_refused_with_the_reason(start_yard):
    yard = start_yard(old=LARGE, load="demand", models="a,b", pin="a", settings={"memory_budget_mib": 120}).ready()
    assert ask(yard, "a").status_code == 200
    assert ask(yard, "b").status_code == 200, "unknown need: it is tried once"
    until(lambda: loaded(yard) == {"a"}, "the one that is not pinned to be gone")
    refused = ask(yard, "b")
    assert refused.status_code == 503
    assert "b needs" in refused.json()["error"]["message"]
    assert ask(yard, "a").status_code == 200


def test_what_is_not_used_is_unloaded(start_yard):
    yard = start_yard(models="a,b", pin="b", settings={"unload_after_s": 0.5}).ready()
    until(lambda: loaded(yard) == {"b"}, "the one that is not pinned to be gone")
    assert ask(yard, "a").status_code == 200


@pytest.mark.parametrize("what", ["promote", "rollback"])
def test_a_move_of_an_unloaded_model_loads_it(start_yard, what):
    yard = start_yard(models="a").ready()
    if what == "rollback":
        yard.orders.order("promote", model="a", to="new")
    yard.orders.order("unload", model="a")
    yard.orders.order(what, model="a")
    assert loaded(yard) == {"a"}
    assert ask(yard, "a").status_code == 200
    assert len(yard.engines_left()) == 1


@pytest.mark.parametrize(
    ("engine", "args", "mapped"), [("llama.cpp", (), 1), ("llama.cpp", ("--no-mmap",), 0), ("mistral.rs", (), 0)]
)
def test_weights_that_an_engine_maps_count_as_those_that_it_copies(tmp_path, engine, args, mapped):
    """What is measured of an engine is private; the budget compares it with that of others."""
    gguf = write_gguf(tmp_path / "m.gguf")
    own = EngineArgs(args=args)
    found = {"engine": engine, "form": "binary", "program": ("x",), "version": "1"}
    spec = LaunchSpec(**found, model_id="m", gguf=gguf, settings=Settings(gpu_layers=0), own=own)
    unit = SimpleNamespace(spec=spec, stats=SimpleNamespace(held_bytes=1000))
    assert needed_bytes(unit) == (1000 + mapped * read_header(gguf).tensor_bytes,) * 2
