"""The drift probe: what it asks, when it is sure, and what it remembers."""

import json
import math
from pathlib import Path

import pytest
from gguf_files import write_gguf
from hypothesis import given
from hypothesis import strategies as st

from engines.settings import Settings
from engines.yard.engine.drift import LOOKS, SAME_NATS, Drift, distance
from engines.yard.engine.launch_spec import LaunchSpec

TOPS = {"Hello": -0.5, "Hi": -2.0, "Hey": -3.0, "rare": -9.0}
shifts = st.floats(-5, 5, allow_nan=False)


def spec(tmp_path: Path, **changed: object) -> LaunchSpec:
    plain = {"engine": "llama.cpp", "form": "binary", "program": ("llama-server",), "version": "1", "model_id": "m"}
    return LaunchSpec(**{**plain, "gguf": tmp_path / "m.gguf", **changed})


def chat(tops: dict[str, float]) -> bytes:
    listed = [{"token": token, "logprob": logprob} for token, logprob in tops.items()]
    return json.dumps({"choices": [{"logprobs": {"content": [{"top_logprobs": listed}]}}]}).encode()


def plain(tops: dict[str, float]) -> bytes:
    return json.dumps({"choices": [{"logprobs": {"top_logprobs": [tops]}}]}).encode()


def moved(by: float) -> dict[str, float]:
    return {**TOPS, "Hi": TOPS["Hi"] + by}


def taken(drift: Drift, *answers: dict[str, float], shape=chat) -> list[str]:
    return [drift.take(200, shape(answer)) for answer in answers]


@given(st.dictionaries(st.text(max_size=3), st.floats(-4, 0), min_size=2, max_size=10), shifts)
def test_a_distance_is_that_of_the_token_that_moved_most(tops, by):
    """Equal answers are at 0, from either side the same; a likely token that moves is seen at its full length."""
    token = max(tops, key=tops.__getitem__)
    other = {**tops, token: tops[token] + by}
    assert distance(tops, tops) == 0
    assert distance(tops, other) == distance(other, tops) == pytest.approx(abs(by))


def test_a_token_that_is_not_listed_counts_with_the_least_that_is():
    assert distance({"a": -0.1, "b": -3.0}, {"a": -0.1, "c": -2.0}) == pytest.approx(1.0)
    assert distance({"a": -0.1, "b": -9.0}, {"a": -0.1, "c": -8.0}) == 0, "both are rare"


@pytest.mark.parametrize("shape", [chat, plain])
def test_another_process_that_answers_the_same_is_known_after_one_answer(tmp_path, shape):
    first = Drift(spec(tmp_path), tmp_path, "m")
    assert taken(first, *[TOPS] * LOOKS, shape=shape) == [""] * LOOKS
    assert not first.is_due
    again = Drift(spec(tmp_path), tmp_path, "m")
    assert again.is_due
    assert taken(again, moved(SAME_NATS / 2), shape=shape) == [""]
    assert not again.is_due


def test_a_change_is_an_incident_once_it_is_seen_in_each_of_three_answers(tmp_path):
    taken(Drift(spec(tmp_path), tmp_path, "m"), *[TOPS] * LOOKS)
    other = Drift(spec(tmp_path), tmp_path, "m")
    *before, said = taken(other, *[moved(0.3)] * LOOKS)
    assert before == [""] * (LOOKS - 1)
    assert "likely next tokens differ by 0.3 nats (limit 0.05)" in said
    assert not other.is_due
    assert taken(Drift(spec(tmp_path), tmp_path, "m"), moved(0.3)) == [""], "the same change is said twice"


def test_one_odd_answer_is_none(tmp_path):
    taken(Drift(spec(tmp_path), tmp_path, "m"), *[TOPS] * LOOKS)
    other = Drift(spec(tmp_path), tmp_path, "m")
    assert taken(other, moved(0.3), TOPS, moved(0.3), moved(0.3), TOPS) == [""] * 5


def test_the_limit_follows_the_noise_of_the_baseline(tmp_path):
    noisy = [TOPS, moved(0.04), TOPS]
    taken(Drift(spec(tmp_path), tmp_path, "m"), *noisy)
    assert taken(Drift(spec(tmp_path), tmp_path, "m"), *[moved(0.19)] * LOOKS) == [""] * LOOKS
    assert taken(Drift(spec(tmp_path), tmp_path, "m"), *[moved(0.21)] * LOOKS)[-1]


def test_other_settings_have_a_baseline_of_their_own(tmp_path):
    """A plan that asks for another context or file is no drift; another build under the same name may be one."""
    taken(Drift(spec(tmp_path), tmp_path, "m"), *[TOPS] * LOOKS)
    settings = Settings(context_tokens=4096)
    assert taken(Drift(spec(tmp_path, settings=settings), tmp_path, "m"), *[moved(1)] * LOOKS) == [""] * LOOKS
    assert taken(Drift(spec(tmp_path, version="2", program=("new",)), tmp_path, "m"), *[moved(1)] * LOOKS)[-1]


@pytest.mark.parametrize(
    ("status", "answer"),
    [
        (400, b'{"error": {"message": "logprobs"}}'),
        (200, b"no JSON"),
        (200, b'{"choices": [{"message": {}}]}'),
        (200, chat({"only": -0.1})),
        (200, chat({"a": math.nan, "b": -1.0})),
        (200, chat({"a": True, "b": -1.0})),
        (200, chat({"a": "-0.1", "b": -1.0})),  # type: ignore[dict-item]
        (200, b'{"choices": [{"logprobs": {"content": null}}]}'),
        (200, b"[]"),
        (0, b""),
    ],
)
def test_an_engine_without_alternatives_is_asked_once(tmp_path, status, answer):
    drift = Drift(spec(tmp_path), tmp_path, "m")
    assert drift.take(status, answer) == ""
    assert not drift.is_due
    assert not drift.is_possible


def test_an_engine_that_does_not_answer_is_left_to_the_liveness_probes(tmp_path):
    """Asked over and over, it would keep them from finding out that it is gone."""
    drift = Drift(spec(tmp_path), tmp_path, "m")
    drift.no_answer()
    assert not drift.is_due
    assert drift.is_possible, "asked again once a liveness probe succeeded"
    drift.take(200, chat(TOPS))
    assert drift.is_due
    drift.no_answer()
    assert not drift.is_due


@pytest.mark.parametrize("stored", [b"", b"[1]", b'{"x": 1}', b'{"x": {"tops": "no"}}', b"\xff"])
def test_a_file_that_cannot_be_read_is_begun_anew(tmp_path, stored):
    file = tmp_path / "yard" / "drift.json"
    file.parent.mkdir()
    file.write_bytes(stored)
    assert taken(Drift(spec(tmp_path), tmp_path, "m"), *[TOPS] * LOOKS) == [""] * LOOKS
    assert len(json.loads(file.read_bytes())) == 1


@pytest.mark.parametrize(
    ("template", "path"),
    [
        ("{{ messages[0].content }}", "/v1/chat/completions"),
        ("{{ strftime_now('%d %b') }}", "/v1/completions"),
        (None, "/v1/completions"),
    ],
)
def test_a_template_with_a_clock_is_not_asked(tmp_path, template, path):
    write_gguf(tmp_path / "m.gguf", template=template)
    asked, body = Drift(spec(tmp_path), tmp_path, "m").request()
    assert asked == path
    assert json.loads(body)["max_tokens"] == 1
