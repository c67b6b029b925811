"""Which errors are one check's, and which end the run; whose fault an engine's error is."""

import errno

import httpx
import pytest
from sqlalchemy.exc import OperationalError

from engines.errors import BadInput, EngineExited, EngineStalled, PortTaken, SwitchyardError
from tasks.evidence.unmeasured import broken, ends_the_run, judge_unmeasured, left_out


def behind(outer: BaseException, cause: BaseException, *, told: bool = True) -> BaseException:
    """`outer` as it comes out of a library that met `cause`; `told` with a `from`."""
    try:
        try:
            raise cause
        except BaseException as met:
            raise outer from (met if told else None)
    except BaseException as raised:
        return raised


DATABASE = OperationalError("insert", {}, Exception("database or disk is full"))
REFUSED = {"returncode": 1, "log_tail": ("loading", "0.00.070.171 E error: unknown model", "bye")}


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (KeyboardInterrupt(), True),
        (behind(RuntimeError("cannot join"), KeyboardInterrupt()), True),
        (behind(RuntimeError("cannot join"), KeyboardInterrupt(), told=False), True),
        (ExceptionGroup("tasks", [ValueError("x"), behind(OSError("y"), SystemExit(1))]), True),
        (BadInput("no such key"), True),
        (behind(SwitchyardError("the database refused"), DATABASE), True),
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (behind(SwitchyardError("not stored"), OSError(errno.EROFS, "read-only")), True),
        (KeyError("logprobs"), False),
        (MemoryError(), False),
        (httpx.ReadTimeout("timed out"), False),
        (OSError(errno.ECONNREFUSED, "refused"), False),
        (EngineStalled("no progress", stalled_s=120), False),
        (SwitchyardError("ttft is nan: store None"), False),
    ],
)
def test_what_ends_the_run_is_told_from_what_ends_a_check(error: BaseException, ends: bool) -> None:
    assert ends_the_run(error) is ends


@pytest.mark.parametrize(
    ("arm", "error", "verdict"),
    [
        ("candidate", EngineExited("mistral.rs ended", **REFUSED), "FAIL"),
        ("candidate", EngineStalled("no progress", stalled_s=120), "FAIL"),
        ("incumbent", EngineExited("llama.cpp ended", **REFUSED), "ERROR"),
        ("candidate", PortTaken("port 8099 is taken"), "ERROR"),
        ("candidate", KeyError("logprobs"), "ERROR"),
        ("both", EngineExited("one of them ended", **REFUSED), "ERROR"),
    ],
)
def test_only_a_candidate_that_does_not_serve_fails(arm, error, verdict) -> None:
    assert judge_unmeasured(arm, "launch", broken(arm, error)).verdict == verdict


def test_the_line_that_tells_of_the_error_is_quoted_without_its_clock() -> None:
    result = judge_unmeasured("candidate", "launch", broken("candidate", EngineExited("mistral.rs ended", **REFUSED)))
    assert (result.check, result.why) == ("launch.candidate", "mistral.rs ended: error: unknown model")


def test_what_was_left_out_is_unproven_under_the_name_of_its_check() -> None:
    result = judge_unmeasured("both", "soak.left_out", left_out("not measured: scheduled"))
    assert (result.check, result.verdict) == ("stability.failures", "INCONCLUSIVE")
