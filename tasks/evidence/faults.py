"""Faults on purpose: is the engine's death or hang noticed, classified and recovered from, and how fast?

sigkill         the process is killed in the middle of a stream
sigstop         the process is frozen in the middle of a stream: alive, port open, no token
truncated_gguf  the model file is cut short
port_taken      another process listens on the port
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil

from engines.errors import EngineError, EngineExited, PortTaken
from engines.openai.sse import DONE_DATA, payloads
from engines.process.readiness import exit_reason
from engines.process.serving import Served, serving
from engines.units import number_of
from tasks.evidence.behaviours.caller import Caller
from tasks.evidence.engine_under_test import EngineUnderTest, ends_within
from tasks.evidence.unmeasured import error_lines
from tasks.verdicts.verdict import CheckResult, Verdict, at_most

MIN_HANG_S = 2.0
GAPS_TO_HANG = 20  # a silence of so many of the longest gaps seen is a hang
POLL_S = 0.02
DYING_S = 5.0  # a dying process closes its sockets before its pid goes, on a GPU by seconds
SEEN_TOKENS = 4
COPY_BYTES = 64 * 1024 * 1024
EXPECTED = {"sigkill": "dead", "sigstop": "wedged", "truncated_gguf": "refused", "port_taken": "refused"}
KINDS = tuple(EXPECTED)


def measure_faults(engine: EngineUnderTest, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Per fault: what it was taken for, seconds to notice and to serve again, and what the client saw.

    A drill that cannot be carried out is evidence as well: `{"failed": reason}`.
    """
    evidence: dict[str, Any] = {}

    def drilled(kind: str, drill: Callable[[], dict[str, Any]]) -> None:
        progress(kind.replace("_", " "))
        try:
            evidence[kind] = drill()
        except (EngineError, OSError) as error:
            evidence[kind] = {"failed": str(error).splitlines()[0]}

    with contextlib.closing(_Running(engine)) as running:
        drilled("sigkill", partial(_interrupted, running, signal.SIGKILL))
        drilled("sigstop", partial(_interrupted, running, signal.SIGSTOP))
    drilled("truncated_gguf", partial(_truncated, engine))
    drilled("port_taken", partial(_port_taken, engine))
    return evidence


def judge_faults(
    evidence: Mapping[str, Any], *, kill_detect_s: float, hang_detect_s: float, recover_s: float
) -> list[CheckResult]:
    """Each fault noticed, classified and recovered from in time: seconds beyond the no-progress and the load time."""
    results = []
    for kind, expected in EXPECTED.items():
        check, seen = f"faults.{kind}", evidence[kind]
        if broken := seen.get("failed"):
            results.append(CheckResult(check=check, verdict=Verdict.ERROR, why=f"the drill failed: {broken}"))
            continue
        why = f"taken for {seen['classified']} (right: {expected}); {seen.get('client_saw', seen['evidence'])}"
        verdict = Verdict.PASS if seen["classified"] == expected else Verdict.FAIL
        results.append(CheckResult(check=check, verdict=verdict, why=why))
        if expected == "refused":
            continue
        limit_s = kill_detect_s if kind == "sigkill" else seen["no_progress_s"] + hang_detect_s
        why = f"noticed after {seen['detect_s']:.2f} s as {seen['classified']}: {seen['evidence']}"
        results.append(at_most(f"{check}_detect_s", seen["detect_s"], limit=limit_s, unit="s", why=why))
        limit_s = seen["load_s"] + recover_s
        why = f"serving again {seen['recover_s']:.2f} s after that; a start takes {seen['load_s']:.2f} s"
        results.append(at_most(f"{check}_recover_s", seen["recover_s"], limit=limit_s, unit="s", why=why))
    return results


class _Running:
    """The engine that drills befall: what was started to recover from one is there for the next, a load less."""

    def __init__(self, engine: EngineUnderTest) -> None:
        self._engine, self._up = engine, contextlib.ExitStack()
        self._served: Served | None = None

    def get(self) -> Served:
        """It, started where it is not up."""
        if self._served is None:
            self._served = self._up.enter_context(self._engine.up())
        return self._served

    def close(self) -> None:
        """End it."""
        self._served = None
        self._up.close()


def _interrupted(running: _Running, number: signal.Signals) -> dict[str, Any]:
    served = running.get()
    with contextlib.closing(running):
        stream = _Stream(served)
        stream.wait_for(SEEN_TOKENS)
        gaps_s = (b - a for a, b in itertools.pairwise(list(stream.arrivals)))
        no_progress_s = max(MIN_HANG_S, GAPS_TO_HANG * max(gaps_s, default=0.0))
        served.process.send_signal(number)
        hit_at = time.monotonic()
        classified, evidence = _watch(served, stream, no_progress_s)
        noticed_at = time.monotonic()
        served.process.stop(grace_s=1.0)
        stream.end.wait(timeout=10)
    running.get()
    return {
        "load_s": served.load_s,
        "no_progress_s": no_progress_s,
        "classified": classified,
        "evidence": evidence,
        "detect_s": noticed_at - hit_at,
        "client_saw": stream.outcome,
        "recover_s": time.monotonic() - noticed_at,
    }


def _watch(served: Served, stream: _Stream, no_progress_s: float) -> tuple[str, str]:
    """Dead by its pid, or wedged by tokens that stopped while the process runs; whichever is true first."""
    while True:
        if served.process.poll() is not None:
            return "dead", f"the process ended with {exit_reason(served.process)}"
        silent_s = time.monotonic() - stream.arrivals[-1]
        if silent_s > no_progress_s:
            with contextlib.suppress(psutil.Error):
                state = psutil.Process(served.process.pid).status()
                return "wedged", f"alive ({state}), a request in progress and no token for {silent_s:.1f} s"
        if stream.end.is_set() and not ends_within(served, DYING_S):
            return "lost stream", f"the stream ended ({stream.outcome}) while the process runs"
        time.sleep(POLL_S)


class _Stream:
    """One long streamed answer read in a thread, with the arrival time of every chunk."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self.arrivals: list[float] = []
        self.outcome = "still open"
        self.end = threading.Event()
        threading.Thread(target=self._read, name="drill", daemon=True).start()

    def wait_for(self, chunks: int, deadline_s: float = 120.0) -> None:
        """Return when `chunks` chunks arrived; EngineError when the stream ends or the deadline passes before."""
        limit = time.monotonic() + deadline_s
        while len(self.arrivals) < chunks:
            if self.end.is_set() or time.monotonic() > limit:
                raise EngineError(
                    f"the stream gave {number_of(len(self.arrivals), 'chunk')} before the fault: {self.outcome}"
                )
            time.sleep(POLL_S / 4)

    def _read(self) -> None:
        try:
            with Caller(self._served.endpoint) as caller:
                question = "Tell me a very long story about a river."
                body = caller.body(question, temperature=None, max_tokens=400, stream=True, ignore_eos=True)
                with caller.http.stream("POST", "/v1/chat/completions", json=body) as answer:
                    last = b""
                    for data in payloads(answer.iter_bytes()):
                        self.arrivals.append(time.monotonic())
                        last = data
                self.outcome = "a whole answer" if last == DONE_DATA else "the stream ended without [DONE]"
        except httpx.HTTPError as error:
            self.outcome = f"{type(error).__name__}: {error}"
        finally:
            self.end.set()


def _truncated(engine: EngineUnderTest) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=engine.home) as folder:
        cut = _cut_short(engine.gguf, Path(folder))
        started = time.monotonic()
        try:
            with replace(engine, gguf=cut, stall_s=30.0).up():
                return {"classified": "served", "evidence": "it serves a model whose file is cut short"}
        except EngineExited as error:
            reason = (error_lines(error.log_tail) or [str(error)])[-1][:200]
            return {"classified": "refused", "evidence": reason, "detect_s": time.monotonic() - started}
        except EngineError as error:
            return {"classified": type(error).__name__, "evidence": str(error).splitlines()[0]}


def _cut_short(given: Path, folder: Path) -> Path:
    """A copy in `folder` of a model file that ends early; of a directory, with the largest file cut."""
    target, whole = folder / given.name, given
    if given.is_dir():
        target.mkdir()
        files = [file for file in given.iterdir() if file.is_file()]
        whole = max(files, key=lambda file: file.stat().st_size)
        for file in files:
            if file != whole:
                (target / file.name).symlink_to(file)
    with whole.open("rb") as source:  # enough for the header, not for the tensors
        (target / whole.name if given.is_dir() else target).write_bytes(
            source.read(min(int(whole.stat().st_size * 0.6), COPY_BYTES))
        )
    return target


def _port_taken(engine: EngineUnderTest) -> dict[str, Any]:
    serve = engine.serve()
    with socket.socket() as held:
        held.bind(("127.0.0.1", serve.port))
        held.listen()
        started = time.monotonic()
        try:
            log_path = engine.home / "logs" / "port-taken.log"
            with serving(engine.driver, engine.installation, serve, state_dir=engine.home, log_path=log_path):
                return {"classified": "served", "evidence": "it claims to serve a port that another process holds"}
        except PortTaken as error:
            return {"classified": "refused", "evidence": str(error), "detect_s": time.monotonic() - started}
