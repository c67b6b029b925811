"""Generations: they take turns, each is a stream of pieces, and what becomes of them is counted.

- a blocking call borrows the wheel's runner, so a second one raises "Already borrowed": every generation is a stream;
- on the CPU, two sequences of equal length in one batch fail: there, generations take turns, first come first served;
- a stop string of one token never matches where that token would carry a space before it (0.9.5): stop strings are
  found in the text here, and the engine is left as soon as one is complete.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, replace

from engines.mistral_rs.native import requests, responses, stop_text
from engines.mistral_rs.native.model import Job, LoadedModel, engine_error, new_id
from engines.mistral_rs.native.requests import ApiError
from engines.mistral_rs.native.responses import Piece

MAX_QUEUE = 512
KEEP_ALIVE = b": keep-alive\n\n"
END_REASONS = ("stop", "length", "tool_calls", "canceled", "error")


@dataclass(frozen=True)
class Admitted:
    """The first thing a generation yields: its turn has come and its prompt fits."""

    prompt_tokens: int


Pieces = AsyncGenerator[Admitted | Piece, None]


class Turns:
    """Admits generations to the engine, *slots* at a time, in order of arrival."""

    def __init__(self, slots: int) -> None:
        self._free = asyncio.Semaphore(slots)
        self.waiting = 0
        self.running = 0

    async def take(self) -> None:
        """Wait for a turn; ApiError 503 when too many wait already."""
        if self.waiting >= MAX_QUEUE:
            raise ApiError(503, f"{MAX_QUEUE} requests are waiting", type="unavailable_error", code="queue_full")
        self.waiting += 1
        try:
            await self._free.acquire()
            self.running += 1
        finally:
            self.waiting -= 1

    def give_back(self) -> None:
        self.running -= 1
        self._free.release()


class Counters:
    """What GET /metrics reports of the generations since the start."""

    def __init__(self) -> None:
        self.completed: collections.Counter[str] = collections.Counter()
        self.tokens = 0
        self.first_tokens = 0
        self.first_token_s = 0.0

    def text(self, turns: Turns) -> str:
        """Prometheus' text format 0.0.4, under the names of mistral.rs's own server where it has one."""
        ended = {f'{{reason="{reason}"}}': self.completed[reason] for reason in END_REASONS}
        tokens_help = "Prompt and completion tokens, counted as they are done; cached prompt tokens included."
        first_help = "From a generation's arrival, waiting included, to its first token."
        first_token = {"_sum": self.first_token_s, "_count": self.first_tokens}
        metrics: tuple[tuple[str, str, str, Mapping[str, float]], ...] = (
            ("sequences_running", "gauge", "Generations on the engine.", {"": turns.running}),
            ("sequences_waiting", "gauge", "Generations waiting for a turn.", {"": turns.waiting}),
            ("sequences_completed_total", "counter", "Generations ended, by reason.", ended),
            ("tokens_processed_total", "counter", tokens_help, {"": self.tokens}),
            ("time_to_first_token_seconds", "summary", first_help, first_token),
        )
        lines = []
        for name, kind, meaning, samples in metrics:
            lines += [f"# HELP mistralrs_{name} {meaning}", f"# TYPE mistralrs_{name} {kind}"]
            lines += [f"mistralrs_{name}{suffix} {value}" for suffix, value in samples.items()]
        return "\n".join(lines) + "\n"


async def count_tokens(pieces: Pieces, counters: Counters) -> Pieces:
    """The pieces of one generation as the engine makes them; their tokens and the first one's delay are counted."""
    arrived_at, prompt_tokens, n_tokens = time.monotonic(), 0, 0
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            if isinstance(piece, Admitted):
                prompt_tokens = piece.prompt_tokens
            else:
                if n_tokens == 0:
                    counters.first_tokens += 1
                    counters.first_token_s += time.monotonic() - arrived_at
                    counters.tokens += prompt_tokens
                # A chunk may stand for more than one token, and the last one has the true number.
                now = max(n_tokens, piece.usage.completion_tokens) if piece.usage else n_tokens + 1
                counters.tokens += now - n_tokens
                n_tokens = now
            yield piece


async def count_endings(pieces: Pieces, counters: Counters) -> Pieces:
    """The pieces of one generation as a client sees them; how it ended is counted, if it had begun."""
    admitted, reason = False, "canceled"
    try:
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                admitted = True
                if isinstance(piece, Piece) and piece.finish:
                    reason = piece.finish
                yield piece
    except ApiError:
        reason = "error"
        raise
    finally:
        if admitted:
            counters.completed[reason] += 1


async def generate(model: LoadedModel, turns: Turns, job: Job) -> Pieces:
    """`Admitted`, then the pieces as the engine makes them. Closing it drops the engine's iterator.

    The turn ends when the worker thread has let go of the engine: a prefill cannot be interrupted.
    """
    await turns.take()
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[Admitted | Piece | ApiError | None] = asyncio.Queue()
    cancelled = threading.Event()

    def post(call: Callable[..., object], *values: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
            loop.call_soon_threadsafe(call, *values)

    def work() -> None:
        try:
            drain(model, job, cancelled, lambda item: post(arrived.put_nowait, item))
        finally:
            post(arrived.put_nowait, None)
            post(turns.give_back)

    threading.Thread(target=work, daemon=True, name="generation").start()
    try:
        while (item := await arrived.get()) is not None:
            if isinstance(item, ApiError):
                raise item
            yield item
    finally:
        cancelled.set()


def drain(
    model: LoadedModel, job: Job, cancelled: threading.Event, emit: Callable[[Admitted | Piece | ApiError], None]
) -> None:
    """Run *job* to its end, or until *cancelled*; what goes wrong is emitted as an ApiError."""
    begun = False
    try:
        prompt_tokens = model.count(job.prompt)
        room = model.context - prompt_tokens
        if model.context and room < 1:
            raise requests.context_exceeded(prompt_tokens, model.context)
        if cancelled.is_set():
            return
        wanted = [limit for limit in (job.sampling.max_tokens, room if model.context else None) if limit]
        chunks = model.open(job, min(wanted) if wanted else None)  # type: ignore[arg-type]
        emit(Admitted(prompt_tokens))
        finish, places = None, stop_text.TokenPlaces()
        for chunk in chunks:
            if cancelled.is_set():
                return
            piece = model.piece(chunk, job.sampling.logprobs)
            if job.keeps_space and not begun:
                piece = replace(piece, content=model.first_space(chunk) + piece.content)
            piece = places.place(piece)
            begun, finish = True, piece.finish or finish
            emit(piece)
        if finish is None:
            raise ApiError(500, "the engine ended the generation without a reason", type="server_error")
    except BaseException as error:  # a Rust panic is a BaseException
        emit(engine_error(error, job, begun))


async def with_calls(pieces: Pieces, job: Job, forced: bool) -> Pieces:
    """The pieces with tool calls where text was one: forced calls are read here, others by the engine."""
    gate = stop_text.ToolTextGate()
    text = ""
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            if isinstance(piece, Admitted) or not (forced or job.tools):
                yield piece
            elif forced:
                text += piece.content
                if piece.finish:
                    call = stop_text.forced_call(text, new_id("call_"))
                    finish = "tool_calls" if call and piece.finish != "length" else piece.finish
                    calls = (call,) if call else ()
                    yield replace(piece, content="", logprobs=(), starts=(), tool_calls=calls, finish=finish)
            else:
                content = gate.pass_on(piece.content)
                if piece.finish and not piece.tool_calls:
                    content += gate.rest()
                yield replace(piece, content=content)


async def until_stop(pieces: Pieces, stops: tuple[str, ...]) -> Pieces:
    """The pieces, each one token, up to the first stop string; there tokens and times are counted here."""
    cutter = stop_text.StopCutter(stops)
    prompt_tokens, times = 0, [time.monotonic()]
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            if isinstance(piece, Admitted):
                prompt_tokens, times = piece.prompt_tokens, [time.monotonic()]
                yield piece
                continue
            times.append(time.monotonic())
            cut = cutter.pass_on(piece)
            if cut.finish and not piece.finish:
                yield replace(cut, usage=cut_usage(prompt_tokens, times))
                return
            yield cut


def cut_usage(prompt_tokens: int, times_s: list[float]) -> responses.Usage:
    """The usage of a generation that ended at a stop string; *times_s*: when it began, then each token."""
    begun, first, *later = times_s
    return responses.Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=1 + len(later),
        prompt_ms=(first - begun) * 1000,
        predicted_ms=(later[-1] - first) * 1000 if later else None,
    )


async def keep_alive(frames: AsyncGenerator[bytes, None], interval_s: float) -> AsyncGenerator[bytes, None]:
    """The frames, with an SSE comment for every *interval_s* without one. Nothing before the first frame."""
    patience: float | None = None
    pending: asyncio.Future[bytes] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(frames))
            done, _ = await asyncio.wait({pending}, timeout=patience)
            if not done:
                yield KEEP_ALIVE
                continue
            try:
                frame = pending.result()
            except StopAsyncIteration:
                return
            pending, patience = None, interval_s
            yield frame
    finally:
        if pending and not pending.done():
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)
        await frames.aclose()
