"""Wait until an engine has given one real token: the readiness request, and what may go wrong meanwhile."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx
import psutil

from engines.driver import Ask
from engines.errors import (
    EngineError,
    EngineExited,
    EngineNotEnded,
    EngineNotFound,
    EngineRefuses,
    EngineStalled,
    PortTaken,
    WrongListener,
)
from engines.process.attached import NO_PID
from engines.process.cpu_wait import CpuWait, is_stopped
from engines.process.process import ManagedProcess
from engines.process.telemetry import process_tree
from engines.settings import Serve

POLL_S = 0.05
ASK_AGAIN_S = 1.0  # at most, after an answer that held no token
REFUSED_S = 10.0  # so long an engine that has stopped loading may refuse completions before that is its last word
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"  # a model without a chat template may take this only
EMBEDDING = "/v1/embeddings"
RERANK = "/v1/rerank"
NOT_CHAT = (RERANK, EMBEDDING)  # a reranker gives an embedding too, of no use; an embedding server refuses to rank
PROOFS = {CHAT: "one real token", TEXT: "one real token", EMBEDDING: "one embedding", RERANK: "one ranking"}
_NOT_BOUND = re.compile(r"couldn't bind|address already in use|AddrInUse", re.IGNORECASE)
STOPPED_S = 1.0  # a process that is continued at once was never in trouble
NOT_SUPPORTED = 501  # llama-server's answer to a completion when it serves embeddings or a reranker
QUOTED_LINES = 8
OTHER_CPU = (
    ": it was compiled for another CPU, most likely; build it on this machine, or take another build "
    '(of llama.cpp: `switchyard install llama.cpp`, and form = "hosted")'
)


def exit_reason(child: ManagedProcess) -> str:
    """`exit status 1` or `signal SIGKILL` of an ended child."""
    returncode = child.poll()
    if returncode is None:
        return "still running"
    if returncode < 0:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-returncode).name}"
    return f"exit status {returncode}"


def listener_on(port: int) -> str | None:
    """`name (pid N)` of whoever listens on a local port, None when that cannot be seen."""
    return _named(_listener(port))


def _named(process: psutil.Process | None) -> str | None:
    with contextlib.suppress(psutil.Error):
        return process and f"{process.name()} (pid {process.pid})"
    return None


def _listener(port: int) -> psutil.Process | None:
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return psutil.Process(connection.pid)
    return None


def _descends(process: psutil.Process, pid: int) -> bool:
    """By its parents: a list of somebody's descendants misses some while processes come and go."""
    with contextlib.suppress(psutil.Error):
        return pid in (process.pid, *(parent.pid for parent in process.parents()))
    return False


class _LoadClock:
    def __init__(self, child: ManagedProcess) -> None:
        self._child = child
        self._logged = -1
        self._loaded: tuple[int, int] = (-1, -1)
        self._moved_at = self._loaded_at = time.monotonic()
        self._waits = CpuWait(lambda: process_tree(child.pid))
        self._marked = False

    def stalled_s(self) -> float:
        """Since any of them moved; time in which its threads waited for a CPU does not count."""
        self._look()
        still_s = time.monotonic() - self._moved_at
        if still_s > 1 and not self._marked:
            self._marked = True
            self._waits.mark()
        return still_s - self._waits.since_mark_s() if self._marked else still_s

    def loaded_s(self) -> float:
        """Since memory or disk moved: the log also grows with each request that is refused."""
        return time.monotonic() - self._loaded_at

    def _look(self) -> None:
        resident = read = 0
        for pid in process_tree(self._child.pid):
            with contextlib.suppress(psutil.Error, AttributeError):
                member = psutil.Process(pid)
                resident += member.memory_info().rss
                read += member.io_counters().read_bytes
        # in steps of 1 MiB: a few pages of bookkeeping are not progress
        now, loaded, logged = time.monotonic(), (resident >> 20, read >> 20), self._child.bytes_logged
        if loaded != self._loaded:
            self._loaded, self._loaded_at = loaded, now
        elif logged == self._logged:
            return
        self._logged, self._moved_at, self._marked = logged, now, False


def wait_ready(
    engine: str,
    serve: Serve,
    child: ManagedProcess,
    *,
    served_name: str,
    other_server: str = "",
    stall_s: float = 120.0,
    progress: Callable[[str], None] = lambda _: None,
    ask: Ask | None = None,
) -> dict[str, object]:
    """What the engine reports of itself, over HTTP or `ask`, once it gave one token; errors as in `serving`.

    `other_server`: what it is instead of a server for chat, with the path that it answers (`OwnArgs.other_server`).
    """
    ask = ask or over_http(serve)
    clock = _LoadClock(child)
    what = f"loading {serve.gguf.name}" if not serve.url else f"waiting for a token from {serve.url}"
    progress(what)
    token: _FirstToken | None = None
    refused_at: float | None = None
    stopped_at: float | None = None
    ask_at, pause_s = 0.0, POLL_S
    while True:
        if child.poll() is not None:
            raise _exited(engine, serve, child)
        if child.given_up:
            raise EngineNotEnded(f"SIGKILL does not end {engine} (pid {child.pid})", engine=engine)
        now = time.monotonic()
        stopped_at = (stopped_at or now) if is_stopped(child.pid) else None
        if stopped_at is not None and now - stopped_at > STOPPED_S:
            why = f"{engine} was stopped while loading {serve.gguf.name} (state T: SIGSTOP or job control)"
            raise EngineStalled(why, stalled_s=now - stopped_at, engine=engine, log_tail=child.log_tail())
        is_asked = token is None and now >= ask_at
        if is_asked and (serve.url or (_healthy(ask) and _our_listener(engine, serve, child))):
            token = _FirstToken(ask, served_name, NOT_CHAT if other_server else ())
        if token is not None and token.done.is_set():
            if token.arrived:
                known: dict[str, object] = {"first_token_path": token.path, "first_token_s": token.took_s}
                if (context := _context_tokens(ask, served_name)) is not None:
                    known["context_tokens"] = context
                return {**known, "prefill_tokens_per_s": token.prefill_rate}
            if serve.url and not token.statuses:
                why = f"{engine}: nothing answers at {serve.url}: {token.refusal}; start the server there"
                raise EngineNotFound(why, engine=engine)
            if token.statuses and set(token.statuses) != {503}:  # 503: it reports that it is not ready
                refused_at = refused_at or now
            refused_s = 0.0 if refused_at is None else min(now - refused_at, clock.loaded_s())
            if refused_s > REFUSED_S or set(token.statuses) == {NOT_SUPPORTED}:
                why = f"{engine} is up, but answers no completion ({token.refusal}){last_lines(child)}"
                raise EngineRefuses(why, engine=engine, log_tail=child.log_tail())
            token, ask_at, pause_s = None, now + pause_s, min(2 * pause_s, ASK_AGAIN_S)
        stalled_s = clock.stalled_s() if ask_at == 0 else clock.loaded_s()
        if stalled_s > stall_s:
            why = f"{engine} made no progress while {what} for {stalled_s:.0f} s"
            why += "" if serve.url else " (no log line, no memory growth, no disk read)"
            why += last_lines(child)
            raise EngineStalled(why, stalled_s=stalled_s, engine=engine, log_tail=child.log_tail())
        time.sleep(POLL_S)


def _context_tokens(ask: Ask, served_name: str) -> int | None:
    """The context of one sequence as the server reports it: llama.cpp in /props, vLLM in its list of models."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(ask("GET", "/props", None, 5)[1]["default_generation_settings"]["n_ctx"])
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        listed = ask("GET", "/v1/models", None, 5)[1]["data"]
        return next((int(one["max_model_len"]) for one in listed if one["id"] == served_name), None)
    return None


class _FirstToken:
    """One completion of one token, asked in a thread of its own so that the wait can still see death and stall.

    The thread is a daemon: an engine that never answers is stopped by the caller, which also ends the request.
    """

    def __init__(self, ask: Ask, served_name: str, first: Sequence[str] = ()) -> None:
        self._first = first  # asked before a completion, which may end a server that is none for it
        self._ask_engine = ask
        self._served_name = served_name
        self.arrived = False
        self.path = CHAT  # by which it came
        self.took_s = 0.0
        self.prefill_rate: float | None = None  # tokens/s; cautious, for the prompt is tiny and the engine cold
        self.statuses: list[int] = []  # of the answers that held no token
        self.refusal = ""  # the last of them in words
        self.done = threading.Event()
        threading.Thread(target=self._ask, name="readiness", daemon=True).start()

    def _ask(self) -> None:
        try:
            if self._any(self._first):
                return
            self.arrived = self._answers(CHAT) or self._answers(TEXT)
            if not self.arrived and set(self.statuses) == {NOT_SUPPORTED}:  # a server for embeddings, or a reranker
                self._any(NOT_CHAT)
        except (KeyError, TypeError, IndexError):
            self.statuses.append(200)
            self.refusal = "an answer that is no completion"
        except (OSError, ValueError) as error:
            self.arrived, self.refusal = False, str(error)
        finally:
            self.done.set()

    def _any(self, paths: Sequence[str]) -> bool:
        """True when it answers one of them; a refusal here is not its last word."""
        said = self.statuses[:], self.refusal
        with contextlib.suppress(KeyError, TypeError, IndexError):
            self.arrived = any(self._answers(path) for path in paths)
        self.statuses, self.refusal = said
        return self.arrived

    def _answers(self, path: str) -> bool:
        body = smallest_request(path, self._served_name)
        if path in (CHAT, TEXT):
            body["cache_prompt"] = False
        self.path, asked = path, time.monotonic()
        status, answer = self._ask_engine("POST", path, body, None)
        if status != 200:
            self.statuses.append(status)
            self.refusal = refusal_words(status, answer)
            return False
        self.took_s = time.monotonic() - asked
        if not is_proof(path, answer):
            self.statuses.append(status)
            self.refusal = "an answer without a token"
            return False
        self.prefill_rate = answer["usage"]["prompt_tokens"] / self.took_s
        return True


def smallest_request(path: str, served_name: str) -> dict[str, object]:
    """The smallest completion, embedding or ranking: whether an engine gives it is what readiness and liveness mean."""
    if path == EMBEDDING:
        return {"model": served_name, "input": "Hi"}
    if path == RERANK:
        return {"model": served_name, "query": "Hi", "documents": ["Hi"]}
    prompt = {"messages": [{"role": "user", "content": "Hi"}]} if path == CHAT else {"prompt": "Hi"}
    return {"model": served_name, **prompt, "max_tokens": 1, "temperature": 0}


def is_proof(path: str, answer: Any) -> bool:
    """True when the answer holds what was asked for. Raises KeyError, TypeError, IndexError for another shape."""
    if path == EMBEDDING:
        return len(answer["data"][0]["embedding"]) > 0
    if path == RERANK:
        return len(answer["results"]) > 0
    return int(answer["usage"]["completion_tokens"]) >= 1


def refusal_words(status: int, answer: Any) -> str:
    """`HTTP 500: its message` of an error answer's JSON, in one line of at most 300 characters."""
    with contextlib.suppress(KeyError, TypeError):
        return f"HTTP {status}: {answer['error']['message']}".replace("\n", " ")[:300]
    return f"HTTP {status}"


def over_http(serve: Serve) -> Ask:
    key = serve.settings.api_key
    headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}

    def ask(method: str, path: str, body: Mapping[str, object] | None, timeout_s: float | None) -> tuple[int, Any]:
        timeout = httpx.Timeout(timeout_s or 5, read=timeout_s)
        try:
            # certificates, which plain HTTP has none of, take 23 ms of CPU for each question, twenty times a second
            verify = serve.base_url.startswith("https:")
            with httpx.Client(
                base_url=serve.base_url, headers=headers, timeout=timeout, trust_env=False, verify=verify
            ) as http:
                answer = http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise ConnectionError(str(error)) from error
        with contextlib.suppress(ValueError):
            return answer.status_code, answer.json()
        return answer.status_code, None  # a health check in plain text

    return ask


def _healthy(ask: Ask) -> bool:
    try:
        return ask("GET", "/health", None, 5)[0] in (200, 404)  # 404: an engine without one; its token decides
    except (OSError, ValueError):
        return False


def _our_listener(engine: str, serve: Serve, child: ManagedProcess) -> bool:
    """True when our child listens; raises WrongListener when the port answers and somebody else is seen listening."""
    if child.listens_on(serve.port):
        return True
    found = _listener(serve.port)
    if found is not None and _descends(found, child.pid):
        return True
    if (holder := _named(found)) is None:
        return False
    why = f"port {serve.port} is answered by {holder}, not by the {engine} that was started{last_lines(child)}"
    raise WrongListener(why, engine=engine, log_tail=child.log_tail())


def _exited(engine: str, serve: Serve, child: ManagedProcess) -> EngineError:
    holder = listener_on(serve.port)
    ended = f"ended with {exit_reason(child)}"
    if holder is not None:
        why = f"port {serve.port} is answered by {holder}; the {engine} that was started {ended}{last_lines(child)}"
        return WrongListener(why, engine=engine, log_tail=child.log_tail())
    if any(_NOT_BOUND.search(line) for line in child.log_tail()):
        why = f"port {serve.port} was taken when {engine} wanted it; {engine} {ended}{last_lines(child)}"
        return PortTaken(why, engine=engine, log_tail=child.log_tail())
    cause = OTHER_CPU if child.poll() == -signal.SIGILL else ""
    why = f"{engine} {ended} while loading {serve.gguf.name}{cause}{last_lines(child)}"
    return EngineExited(why, returncode=child.poll() or 0, engine=engine, log_tail=child.log_tail())


def last_lines(child: ManagedProcess) -> str:
    """`; its last lines (log: ...)` and they, for the end of an error message; '' for an attached engine."""
    if child.pid == NO_PID:
        return ""
    lines = child.log_tail()[-QUOTED_LINES:]
    if not lines:
        return f"; it logged nothing (log: {child.log.path})"
    return f"; its last lines (log: {child.log.path}):\n  " + "\n  ".join(lines)
