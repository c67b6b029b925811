"""The rehearsal: what its evidence is judged to be, and whether there is room for it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gguf_files import write_gguf

from engines.driver import Installation
from engines.errors import BadInput, EngineError, SwitchyardError
from engines.settings import Settings
from engines.yard.engine.launch_spec import LaunchSpec
from tasks.evidence.rehearsal import (
    Stage,
    engine_of,
    judge_rehearsal,
    measure_rehearsal,
    one_token,
    room,
    signal_candidate,
)
from tasks.verdicts.verdict import Verdict, gate

OLD, NEW = "llama.cpp", "mistral.rs"
HIDDEN: dict[str, Any] = {
    "answered": True,
    "took_s": 0.1,
    "error": None,
    "by": OLD,
    "right": OLD,
    "fallback": OLD,
    "incidents": ["fallback to llama.cpp: mistral.rs is not on this machine"],
}
KILLED: dict[str, Any] = {
    "answered": True,
    "took_s": 3.0,
    "error": None,
    "by": NEW,
    "right": NEW,
    "usual_s": 0.2,
    "detect_s": 0.1,
    "recover_s": 2.9,
    "load_s": 2.0,
}
GOOD = {"hidden_candidate": HIDDEN, "killed_candidate": KILLED, "fallback": {**KILLED, "by": OLD, "right": OLD}}


def judged(**changed: Any) -> dict[str, Verdict]:
    """The verdicts by check, limits of one second each."""
    results = judge_rehearsal({**GOOD, **changed}, kill_detect_s=1, recover_s=1)
    return {result.check.removeprefix("rehearsal."): result.verdict for result in results}


def test_a_fallback_that_works_passes() -> None:
    """Three drills, two of them with their times."""
    verdicts = judged()
    assert set(verdicts.values()) == {Verdict.PASS}
    assert len(verdicts) == 7


@pytest.mark.parametrize(
    ("changed", "check", "verdict"),
    [
        ({"hidden_candidate": {**HIDDEN, "by": NEW}}, "hidden_candidate", Verdict.FAIL),
        ({"hidden_candidate": {**HIDDEN, "fallback": None}}, "hidden_candidate", Verdict.FAIL),
        ({"hidden_candidate": {**HIDDEN, "answered": False, "by": None}}, "hidden_candidate", Verdict.FAIL),
        ({"hidden_candidate": {"failed": "no yard"}}, "hidden_candidate", Verdict.ERROR),
        ({"killed_candidate": {**KILLED, "by": OLD}}, "killed_candidate", Verdict.FAIL),
        ({"killed_candidate": {**KILLED, "answered": False}}, "killed_candidate", Verdict.FAIL),
        ({"killed_candidate": {**KILLED, "detect_s": 1.1}}, "killed_candidate_detect_s", Verdict.FAIL),
        ({"killed_candidate": {**KILLED, "detect_s": None}}, "killed_candidate_detect_s", Verdict.INCONCLUSIVE),
        ({"killed_candidate": {**KILLED, "recover_s": 3.3}}, "killed_candidate_recover_s", Verdict.FAIL),
        ({"fallback": {"failed": "it never died"}}, "fallback", Verdict.ERROR),
    ],
)
def test_what_went_wrong_is_named_by_its_drill(changed: dict[str, Any], check: str, verdict: Verdict) -> None:
    """One check does not pass; the others stay as they were."""
    verdicts = judged(**changed)
    assert verdicts[check] is verdict
    assert [name for name, found in verdicts.items() if found is not Verdict.PASS] == [check]


def test_what_was_not_rehearsed_is_inconclusive() -> None:
    """With the reason, and never PASS."""
    results = judge_rehearsal({"not_rehearsed": "no memory"}, kill_detect_s=1, recover_s=1)
    assert gate(results) is Verdict.INCONCLUSIVE
    assert {result.why for result in results} == {"no memory"}


def test_a_stage_that_does_not_open_is_evidence() -> None:
    """Both drills say why; nothing is raised, nothing passes."""

    @contextmanager
    def closed(hidden: str | None) -> Iterator[Stage]:
        raise EngineError(f"no yard without {hidden}\nits log")
        yield

    evidence = measure_rehearsal(closed, candidate=NEW, form="auto")
    assert evidence["hidden_candidate"] == {"failed": "no yard without mistral.rs"}
    assert evidence["killed_candidate"] == evidence["fallback"] == {"failed": "no yard without None"}
    assert gate(judge_rehearsal(evidence, kill_detect_s=1, recover_s=1)) is Verdict.ERROR
    attached = measure_rehearsal(closed, candidate="hand", form="auto", is_attached=True)
    assert attached["fallback"] == {"not_possible": "not possible for an attached engine: others run 'hand'"}


def test_a_port_where_nobody_answers_is_said() -> None:
    """No exception: it is what the drill saw."""
    told = one_token("http://127.0.0.1:9", "m", None, wait_s=1)
    assert not told["answered"]
    assert "ConnectError" in told["error"]


def test_a_candidate_that_ended_before_its_signal_is_a_failed_drill() -> None:
    """No psutil error: the other drills go on."""
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    route = {"id": "m", "engines": [{"engine": NEW, "pid": gone.pid}]}
    yard: Any = SimpleNamespace(status=lambda: {"pid": 1, "models": [route]})
    stage = Stage(client=yard, address="", key=None, model_id="m", incumbent=OLD, candidate=NEW, wait_s=1)
    with pytest.raises(SwitchyardError, match=rf"{NEW} \(pid {gone.pid}\) ended before it could be signalled"):
        signal_candidate(stage, signal.SIGSTOP, "wedged")


def test_an_engine_that_the_yard_lacks_is_named() -> None:
    """With what to do."""
    with pytest.raises(SwitchyardError, match=r"no mistral.rs for m: see `switchyard doctor`"):
        engine_of({"id": "m", "engines": [{"engine": OLD}]}, NEW)


def recipes(gguf: Path, **settings: Any) -> dict[str, LaunchSpec]:
    return {
        engine: LaunchSpec.of(Installation(engine, "binary", ("x",), "1"), "m", gguf, Settings(**settings))
        for engine in (OLD, NEW)
    }


def test_a_small_model_fits_beside_the_one_that_serves(tmp_path: Path) -> None:
    """The yard then chooses how to move."""
    form, why = room(recipes(write_gguf(tmp_path / "m.gguf"), context_tokens=512), None, None)
    assert (form, why) == ("auto", "both engines fit beside the one that serves")


def test_a_model_that_does_not_fit_is_not_rehearsed(tmp_path: Path) -> None:
    """It could push the engine that serves out of memory."""
    form, why = room(recipes(write_gguf(tmp_path / "m.gguf"), context_tokens=10**12), None, None)
    assert form == ""
    assert why.startswith("llama.cpp does not fit beside the engine that serves: ")


def test_a_model_that_cannot_be_sized_needs_twice_what_serves(tmp_path: Path) -> None:
    """Nobody knows what it takes; what the same model takes now is the best guess."""
    odd = recipes(write_gguf(tmp_path / "m.gguf", "bert"), context_tokens=512)
    assert room(odd, None, None)[0] == ""
    assert room(odd, 1 << 20, None)[0] == "one-at-a-time"
    assert room(odd, 1 << 60, None)[0] == ""


def test_a_gguf_that_cannot_be_read_is_bad_input(tmp_path: Path) -> None:
    """In the words of whoever reads it."""
    with pytest.raises(BadInput):
        room(recipes(tmp_path / "none.gguf"), None, None)
