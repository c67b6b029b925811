"""`/metrics` by the rules of `promtool check metrics`, read by Prometheus' own parser."""

import re
import time
from types import SimpleNamespace

from prometheus_client.parser import text_string_to_metric_families

from engines.yard.engine.health import Health
from engines.yard.metrics import LiveSample, Metrics

# seconds are the unit of time, bytes that of memory; what else a name ends in counts something
OTHER_UNITS = re.compile(r"_(ms|milliseconds|s|us|minutes|hours|mib|kib|mb|kb|percent)(_total)?$")


class Unit(SimpleNamespace):
    __hash__ = object.__hash__


def families(metrics, routes=()):
    return {family.name: family for family in text_string_to_metric_families(metrics.text(routes).decode())}


def used():
    metrics = Metrics()
    metrics.gap("m", "x")(0.01)
    running = SimpleNamespace(chunks=3, sent=time.monotonic(), first=time.monotonic())
    sample = LiveSample(0, "x", "", 3, True, None, False, 3.0, 2.0)
    metrics.served("m", sample, running, time.monotonic(), client_error=False)
    metrics.lost.labels("m", "x").inc()
    metrics.shadowed.labels("m", "x", "same").inc()
    metrics.refused.labels("404").inc()
    metrics.not_passed.labels("unlisted").inc()
    metrics.left.labels('m"\\n\\\\').inc()
    return metrics


def route(engine="x", memory_bytes=5):
    stats = SimpleNamespace(memory_bytes=memory_bytes, vram_bytes=None)
    device = SimpleNamespace(where="cpu")
    unit = Unit(engine=engine, in_flight=[], restarts=2, state=Health.READY, stats=stats, device=device)
    state = SimpleNamespace(canary=None)
    of_model = {"model_id": "m", "waiting": 1, "fallback": None, "overflow": None}
    return SimpleNamespace(**of_model, state=state, units={engine: unit}, serving=unit)


def test_names_types_and_units_are_those_of_prometheus():
    found = families(used(), [route()])
    assert len(found) > 20
    for name, family in found.items():
        assert re.fullmatch(r"switchyard(_[a-z0-9]+)+", name)
        assert family.documentation.strip(), name
        assert family.documentation != name
        assert OTHER_UNITS.search(name) is None, name
        if family.type == "counter":
            assert {sample.name for sample in family.samples} <= {f"{name}_total", f"{name}_created"}
        if family.type == "histogram":
            assert name.endswith("_seconds")
        if family.type == "gauge":
            assert not name.endswith(("_total", "_count", "_sum", "_bucket")), name


def test_no_series_stands_there_twice():
    text = used().text([route(), route("y")]).decode()
    series = [line.rpartition(" ")[0] for line in text.splitlines() if line and not line.startswith("#")]
    assert len(series) == len(set(series))
    heads = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(heads) == len(set(heads))


def test_an_engine_that_is_gone_and_memory_that_is_not_measured_are_absent():
    """Neither 0 nor the last value."""
    metrics = Metrics()
    kept = route()
    assert families(metrics, [kept])["switchyard_engine_memory_bytes"].samples[0].value == 5
    found = families(metrics, [route("y", memory_bytes=None)])
    assert found["switchyard_engine_memory_bytes"].samples == []
    assert {sample.labels["engine"] for sample in found["switchyard_engine_state"].samples} == {"y"}
