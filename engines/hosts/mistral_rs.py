"""mistral.rs behind the OpenAI HTTP API, from its Python wheel: `python -m engines.hosts.mistral_rs --gguf FILE ...`.

The wheel has no server, and its `Runner` differs from the API in ways that this host makes good:

- a blocking call borrows the runner, so a second one raises "Already borrowed": every generation is a stream here;
- on the CPU, two sequences of equal length in one batch fail: there, generations take turns, first come first served;
- its messages keep role and content alone (past tool calls vanish) and a stream cannot take a raw prompt: the chat
  template is rendered here, and the runner gets a template that passes a rendered prompt through;
- a stop string of one token never matches where that token would carry a space before it (0.9.5): stop strings are
  found in the text here, and the engine is left as soon as one is complete;
- its JSON grammar lets a model write line breaks for ever: here it allows no white space between the parts;
- loading holds Python's global lock: until it is over, a forked child answers 503 on the same port.

What it cannot honour: `seed` of a request (read and ignored; the wheel's sampler starts from a constant), `--seed` on
the CPU, `parallel_tool_calls` for forced calls (one call), calls streamed piece by piece (they come whole), images,
embeddings, `suffix`. A missing `max_tokens` means the rest of the context, for /v1/completions too. Where a stop string
ends a generation, `usage` counts the tokens until then, except control tokens amid the text: the wheel does not
tell of them. A forced call and the reasoning of a model are not searched for stop strings.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import hmac
import importlib.metadata
import ipaddress
import json
import os
import re
import select
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engines.errors import BadInput
from engines.hosts import openai_shapes as shapes
from engines.hosts.gguf_text import ChatTemplate, TemplateRefused, Vocabulary, read_metadata
from engines.hosts.openai_shapes import ApiError, Json, Piece

KEY_VARIABLE = "SWITCHYARD_ENGINE_API_KEY"
RENDERED = "rendered prompt"
MAX_BODY_BYTES = 50 * 1024 * 1024
MAX_QUEUE = 512
KEEP_ALIVE_S = 10.0
STOP_GRACE_S = 1.0
END_REASONS = ("stop", "length", "tool_calls", "canceled", "error")
LOADING = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}
STOPPING = {"error": {"message": "The server is shutting down", "type": "unavailable_error", "code": 503}}


# --- the engine -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Job:
    """One generation: a rendered prompt, how to sample, and the tools whose calls the engine shall recognise."""

    prompt: str
    sampling: shapes.Sampling
    tools: tuple[str, ...] = ()


@dataclass(frozen=True)
class Admitted:
    """The first thing a generation yields: its turn has come and its prompt fits."""

    prompt_tokens: int


def first_line(error: BaseException) -> str:
    """The first line of an error of the wheel; the rest is a Rust backtrace."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def on_cpu(force_cpu: bool) -> bool:
    """True when this wheel will compute on the CPU: forced to, or neither built for CUDA nor on macOS (Metal)."""
    return force_cpu or ("cuda" not in importlib.metadata.version("mistralrs") and sys.platform != "darwin")


def shards(gguf: Path) -> list[str]:
    """The file names of a split GGUF, of which *gguf* is the first; otherwise *gguf* alone."""
    match = re.fullmatch(r"(.+)-00001-of-(\d{5})\.gguf", gguf.name)
    if match is None:
        return [gguf.name]
    return [f"{match[1]}-{part:05d}-of-{match[2]}.gguf" for part in range(1, int(match[2]) + 1)]


def compact(schema: str) -> str:
    """The schema, without white space in what it allows: the compact JSON that OpenAI's structured outputs give.

    Where white space is allowed, a small model may write line breaks until its tokens are used up (seen with the
    wheel 0.9.5). `x-guidance` is llguidance's own keyword, read at the root of a schema.
    """
    return json.dumps(json.loads(schema) | {"x-guidance": {"whitespace_flexible": False}})


class Model:
    """A loaded mistral.rs runner with what the API needs to know about its text."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Load; raises what the wheel raises. Takes seconds to minutes and holds the global lock meanwhile."""
        gguf: Path = arguments.gguf
        metadata = read_metadata(gguf)
        self.vocabulary = Vocabulary({} if arguments.tokenizer_json else metadata)
        source = arguments.chat_template.read_text() if arguments.chat_template else None
        self.template = ChatTemplate(source or metadata.get("tokenizer.chat_template", ""), Vocabulary(metadata))
        self._bos = Vocabulary(metadata).special("bos")
        self._lock = threading.Lock()
        self._runner = self._load(arguments)
        self.trained_context: int | None = self._runner.max_sequence_length()
        limits = [limit for limit in (arguments.context, self.trained_context) if limit]
        self.context = min(limits) if limits else 0

    def _load(self, arguments: argparse.Namespace) -> Any:
        from mistralrs import Runner, Which

        extra: Json = {}
        if arguments.prefix_cache is not None:
            extra["prefix_cache_n"] = arguments.prefix_cache
        if arguments.seed is not None and not arguments.serial:
            extra["seed"] = arguments.seed
        # The model's own template stays in the text: the engine looks there for further end-of-turn tokens.
        passing = (
            f"{{% if messages[0]['role'] == '{RENDERED}' %}}{{{{ messages[0]['content'] }}}}"
            f"{{% else %}}{self.template.source}{{% endif %}}"
        )
        with tempfile.NamedTemporaryFile("w", suffix=".jinja", encoding="utf-8") as file:
            file.write(passing)
            file.flush()
            which: Any = Which.GGUF(
                quantized_model_id=str(arguments.gguf.resolve().parent),
                quantized_filename=shards(arguments.gguf),
                tokenizer_json=str(arguments.tokenizer_json) if arguments.tokenizer_json else None,
            )
            return Runner(which=which, max_seqs=arguments.slots, jinja_explicit=file.name, **extra)

    def tokenize(self, text: str, add_special: bool) -> list[int]:
        """Token ids of *text*."""
        with self._lock:
            return self._runner.tokenize_text(text, add_special, None)

    def detokenize(self, tokens: list[int]) -> str:
        """Text of token ids, special tokens included; ApiError 400 for ids outside the vocabulary."""
        size = len(self.vocabulary.tokens)
        if any(token < 0 or (size and token >= size) for token in tokens):
            raise shapes.bad("tokens", f"must be ids of the vocabulary, 0 to {size - 1}")
        with self._lock:
            return self._runner.detokenize_text(tokens, False)

    def count(self, prompt: str) -> int:
        """Tokens that the engine makes of a rendered prompt: it adds no second BOS."""
        return len(self.tokenize(prompt, not (self._bos and prompt.startswith(self._bos))))

    def open(self, job: Job, max_tokens: int) -> Any:
        """The wheel's iterator over chunks; dropping it frees the engine."""
        import mistralrs

        sampling = job.sampling
        request = mistralrs.ChatCompletionRequest(
            messages=[{"role": RENDERED, "content": job.prompt}],
            model="default",
            stream=True,
            max_tokens=max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p or None,
            top_k=1 if sampling.top_p == 0 else sampling.top_k,
            min_p=sampling.min_p,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            logit_bias=sampling.logit_bias,
            ignore_eos=sampling.ignore_eos,
            # With log-probabilities every token is a chunk; without, tokens that end no code point are not told of.
            logprobs=sampling.logprobs or bool(sampling.stop),
            top_logprobs=sampling.top_logprobs,
            grammar=compact(sampling.schema) if sampling.schema else None,
            grammar_type="json_schema" if sampling.schema else None,
            tool_schemas=list(job.tools) or None,
            tool_choice=mistralrs.ToolChoice.Auto if job.tools else None,
        )
        with self._lock:
            return self._runner.send_chat_completion_request(request)

    def piece(self, chunk: Any, wants_logprobs: bool) -> Piece:
        """One chunk of the wheel in neutral words; ApiError 500 for its finish reasons that are failures."""
        choice = chunk.choices[0]
        finish = choice.finish_reason
        if finish not in (None, "stop", "length", "tool_calls"):
            raise ApiError(500, f"the engine ended the generation: {finish}", type="server_error")
        content = choice.delta.content or ""
        if finish == "length":
            # The limit may fall inside a code point; its bytes so far would show as a replacement character.
            content = content.rstrip("\ufffd")
        return Piece(
            content=content,
            reasoning=choice.delta.reasoning_content or "",
            logprobs=(self._logprob(choice.logprobs),) if wants_logprobs and choice.logprobs else (),
            tool_calls=tuple(tool_call(call) for call in choice.delta.tool_calls or ()),
            finish=finish,
            usage=usage_of(chunk.usage) if chunk.usage else None,
        )

    def _logprob(self, logprob: Any) -> Json:
        chosen = bytes(logprob.bytes) if logprob.bytes is not None else logprob.token.encode()
        tops = [shapes.token_entry(self._bytes(top), top.logprob, id=top.token) for top in logprob.top_logprobs]
        entry = shapes.token_entry(chosen, logprob.logprob)
        same = next((top["id"] for top in tops if top["bytes"] == entry["bytes"]), None)
        return (entry if same is None else {"id": same} | entry) | {"top_logprobs": tops}

    def _bytes(self, top: Any) -> bytes:
        known = self.vocabulary.token_bytes(top.token)
        return known if known is not None else (top.bytes or "").encode()


def tool_call(call: Any) -> Json:
    """A call of the wheel as a streamed OpenAI tool call."""
    function = {"name": call.function.name, "arguments": call.function.arguments}
    return {"index": call.index, "id": new_id("call_"), "type": "function", "function": function}


def usage_of(usage: Any) -> shapes.Usage:
    """The wheel's usage in neutral words; its times are seconds."""
    details = getattr(usage, "prompt_tokens_details", None)
    return shapes.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=getattr(details, "cached_tokens", None),
        prompt_ms=usage.total_prompt_time_sec * 1000,
        predicted_ms=usage.total_completion_time_sec * 1000,
    )


def new_id(prefix: str) -> str:
    """A fresh identifier."""
    return prefix + uuid.uuid4().hex[:24]


def engine_error(error: BaseException, job: Job, begun: bool) -> ApiError:
    """What a client is told about an error of the wheel: its first line, 400 when the request is to blame."""
    if isinstance(error, ApiError):
        return error
    reason = first_line(error)
    if job.sampling.schema and not begun:
        return ApiError(400, f"the JSON schema cannot be used: {reason}", param="response_format")
    if "must be" in reason and not begun:
        return ApiError(400, reason)
    return ApiError(500, reason, type="server_error")


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
        """End a turn."""
        self.running -= 1
        self._free.release()


class Counters:
    """What GET /metrics tells of the generations since the start."""

    def __init__(self) -> None:
        self.completed: collections.Counter[str] = collections.Counter()
        self.tokens = 0
        self.first_tokens = 0
        self.first_token_s = 0.0

    def text(self, turns: Turns) -> str:
        """Prometheus' text format 0.0.4, under the names of mistral.rs's own server where it has one."""
        lines = [
            *family("mistralrs_sequences_running", "gauge", "Generations on the engine.", {"": turns.running}),
            *family("mistralrs_sequences_waiting", "gauge", "Generations waiting for a turn.", {"": turns.waiting}),
            *family(
                "mistralrs_sequences_completed_total",
                "counter",
                "Generations ended, by reason.",
                {f'{{reason="{reason}"}}': self.completed[reason] for reason in END_REASONS},
            ),
            *family(
                "mistralrs_tokens_processed_total",
                "counter",
                "Prompt and completion tokens, counted as they are done; cached prompt tokens included.",
                {"": self.tokens},
            ),
            *family(
                "mistralrs_time_to_first_token_seconds",
                "summary",
                "From a generation's arrival, waiting included, to its first token.",
                {"_sum": self.first_token_s, "_count": self.first_tokens},
            ),
        ]
        return "\n".join(lines) + "\n"


def family(name: str, kind: str, meaning: str, samples: dict[str, float]) -> list[str]:
    """One metric in Prometheus' text format; *samples* by what follows the name."""
    return [
        f"# HELP {name} {meaning}",
        f"# TYPE {name} {kind}",
        *(f"{name}{suffix} {value}" for suffix, value in samples.items()),
    ]


async def counted(
    pieces: AsyncGenerator[Admitted | Piece, None], counters: Counters
) -> AsyncGenerator[Admitted | Piece, None]:
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
                # A chunk may stand for more than one token, and the last one tells the true number.
                now = max(n_tokens, piece.usage.completion_tokens) if piece.usage else n_tokens + 1
                counters.tokens += now - n_tokens
                n_tokens = now
            yield piece


async def reckoned(
    pieces: AsyncGenerator[Admitted | Piece, None], counters: Counters
) -> AsyncGenerator[Admitted | Piece, None]:
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


async def generate(model: Model, turns: Turns, job: Job) -> AsyncGenerator[Admitted | Piece, None]:
    """`Admitted`, then the pieces as the engine makes them. Closing it drops the engine's iterator.

    The turn ends when the worker thread has let go of the engine, not when the client has: a prefill cannot be
    interrupted.
    """
    await turns.take()
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[Admitted | Piece | ApiError | None] = asyncio.Queue()
    cancelled = threading.Event()

    def tell(call: Callable[..., object], *values: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
            loop.call_soon_threadsafe(call, *values)

    def work() -> None:
        try:
            drain(model, job, cancelled, lambda item: tell(arrived.put_nowait, item))
        finally:
            tell(arrived.put_nowait, None)
            tell(turns.give_back)

    threading.Thread(target=work, daemon=True, name="generation").start()
    try:
        while (item := await arrived.get()) is not None:
            if isinstance(item, ApiError):
                raise item
            yield item
    finally:
        cancelled.set()


def drain(
    model: Model, job: Job, cancelled: threading.Event, emit: Callable[[Admitted | Piece | ApiError], None]
) -> None:
    """Run *job* to its end, or until *cancelled*; what goes wrong is emitted as an ApiError."""
    begun = False
    try:
        prompt_tokens = model.count(job.prompt)
        room = model.context - prompt_tokens
        if model.context and room < 1:
            raise shapes.context_exceeded(prompt_tokens, model.context)
        if cancelled.is_set():
            return
        wanted = [limit for limit in (job.sampling.max_tokens, room if model.context else None) if limit]
        chunks = model.open(job, min(wanted) if wanted else None)  # type: ignore[arg-type]
        emit(Admitted(prompt_tokens))
        finish, places = None, shapes.TokenPlaces()
        for chunk in chunks:
            if cancelled.is_set():
                return
            piece = places.place(model.piece(chunk, job.sampling.logprobs))
            begun, finish = True, piece.finish or finish
            emit(piece)
        if finish is None:
            raise ApiError(500, "the engine ended the generation without a reason", type="server_error")
    except BaseException as error:  # a Rust panic is a BaseException
        emit(engine_error(error, job, begun))


# --- answers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one request makes the engine do: its jobs, one per choice, and how the result is told."""

    head: shapes.Head
    jobs: list[Job]
    n: int
    stream: bool
    include_usage: bool
    forced: bool = False
    echoes: tuple[str, ...] = ()

    def echo(self, index: int) -> str:
        """The prompt that is repeated before the text of choice *index*; mostly empty."""
        return self.echoes[index // self.n] if self.echoes else ""


async def with_calls(
    pieces: AsyncGenerator[Admitted | Piece, None], job: Job, forced: bool
) -> AsyncGenerator[Admitted | Piece, None]:
    """The pieces with tool calls where text was one: forced calls are read here, others by the engine."""
    gate = shapes.ToolTextGate()
    text = ""
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            if isinstance(piece, Admitted) or not (forced or job.tools):
                yield piece
            elif forced:
                text += piece.content
                if piece.finish:
                    yield forced_piece(piece, text)
            else:
                content = gate.pass_on(piece.content)
                if piece.finish and not piece.tool_calls:
                    content += gate.rest()
                yield replace(piece, content=content)


async def until_stop(
    pieces: AsyncGenerator[Admitted | Piece, None], stops: tuple[str, ...]
) -> AsyncGenerator[Admitted | Piece, None]:
    """The pieces up to the first stop string, where the engine is left; then tokens and times are counted here.

    One piece is one token, see `Model.open`.
    """
    cutter = shapes.StopCutter(stops)
    prompt_tokens, times = 0, [time.monotonic()]
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            if isinstance(piece, Admitted):
                prompt_tokens, times = piece.prompt_tokens, [time.monotonic()]
                yield piece
                continue
            times.append(time.monotonic())
            told = cutter.pass_on(piece)
            if told.finish and not piece.finish:
                yield replace(told, usage=cut_usage(prompt_tokens, times))
                return
            yield told


def cut_usage(prompt_tokens: int, times_s: list[float]) -> shapes.Usage:
    """The usage of a generation that ended at a stop string; *times_s*: when it began, then each token."""
    begun, first, *later = times_s
    return shapes.Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=1 + len(later),
        prompt_ms=(first - begun) * 1000,
        predicted_ms=(later[-1] - first) * 1000 if later else None,
    )


def forced_piece(last: Piece, text: str) -> Piece:
    """The one piece of a forced call, from all its *text*."""
    call = shapes.forced_call(text, new_id("call_"))
    finish = "tool_calls" if call and last.finish != "length" else last.finish
    return replace(last, content="", logprobs=(), starts=(), tool_calls=(call,) if call else (), finish=finish)


class Service:
    """The loaded model behind its routes."""

    def __init__(self, model: Model, model_id: str, slots: int) -> None:
        self.model = model
        self.model_id = model_id
        self.slots = slots
        self.started = int(time.time())
        self.turns = Turns(slots)
        self.counters = Counters()
        self.stopping = asyncio.Event()

    def pieces(self, plan: Plan, job: Job) -> AsyncGenerator[Admitted | Piece, None]:
        """One choice's pieces."""
        made = counted(generate(self.model, self.turns, job), self.counters)
        told = with_calls(made, job, plan.forced)
        if job.sampling.stop:
            told = until_stop(told, job.sampling.stop)
        return reckoned(told, self.counters)

    async def whole(self, plan: Plan) -> Json:
        """The response body of a request that is not streamed; choices are generated one after the other."""
        choices, usages = [], []
        for index, job in enumerate(plan.jobs):
            async with contextlib.aclosing(self.pieces(plan, job)) as arriving:
                pieces = [piece async for piece in arriving if isinstance(piece, Piece)]
            choices.append(shapes.whole_choice(plan.head, index, pieces, plan.echo(index)))
            usages += [piece.usage for piece in pieces if piece.usage]
        body = plan.head.body(stream=False, choices=choices)
        return body | {"usage": shapes.usage_body(usages, plan.n), "timings": shapes.timings_body(usages)}

    async def frames(self, plan: Plan) -> AsyncGenerator[bytes, None]:
        """The SSE frames of a streamed request; an empty one when the first choice has been admitted."""
        usages: list[shapes.Usage] = []
        for index, job in enumerate(plan.jobs):
            opening = [shapes.opening_choice(plan.head, index)]
            echo = plan.echo(index)
            if echo:
                opening.append(shapes.text_choice(index, echo))
            offset, finish = len(echo), "stop"
            async with contextlib.aclosing(self.pieces(plan, job)) as arriving:
                async for piece in arriving:
                    if isinstance(piece, Admitted):
                        yield b""
                        continue
                    for choice in [*opening, shapes.piece_choice(plan.head, index, piece, offset)]:
                        if choice:
                            yield shapes.sse(plan.head.body(stream=True, choices=[choice]))
                    opening, offset, finish = [], offset + len(piece.content), piece.finish or finish
                    usages += [piece.usage] if piece.usage else []
            closing = plan.head.body(stream=True, choices=[shapes.closing_choice(plan.head, index, finish)])
            last = index == len(plan.jobs) - 1
            timings = {"timings": shapes.timings_body(usages)} if last and not plan.include_usage else {}
            yield shapes.sse(closing | timings)
        if plan.include_usage:
            body = plan.head.body(stream=True, choices=[])
            told = {"usage": shapes.usage_body(usages, plan.n), "timings": shapes.timings_body(usages)}
            yield shapes.sse(body | told)
        yield shapes.DONE

    def answer(self, plan: Plan, headers: dict[str, str] | None = None) -> Answer:
        """The response to a planned request."""

        async def tell(scope: Scope, receive: Receive, send: Send) -> None:
            if plan.stream:
                await send_frames(keep_alive(self.frames(plan), KEEP_ALIVE_S), send, headers or {})
            else:
                await JSONResponse(await self.whole(plan), headers=headers)(scope, receive, send)

        return Answer(tell, self.stopping)

    def head(self, chat: bool) -> shapes.Head:
        """A fresh response head."""
        identifier = new_id("chatcmpl-" if chat else "cmpl-")
        return shapes.Head(id=identifier, created=int(time.time()), model=self.model_id, chat=chat)


async def keep_alive(frames: AsyncGenerator[bytes, None], interval_s: float) -> AsyncGenerator[bytes, None]:
    """The frames, with an SSE comment for every *interval_s* without one. Nothing before the first frame."""
    patience: float | None = None
    pending: asyncio.Future[bytes] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(frames))
            done, _ = await asyncio.wait({pending}, timeout=patience)
            if not done:
                yield shapes.KEEP_ALIVE
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


async def send_frames(frames: AsyncGenerator[bytes, None], send: Send, headers: dict[str, str]) -> None:
    """Send an event stream. Its headers wait for the first frame, so that an early error keeps its status.

    A later error becomes an error event, after which the stream ends without a finish reason or [DONE].
    """
    plain = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", **headers}
    raw = [(name.encode(), value.encode()) for name, value in plain.items()]
    begun = False
    async with contextlib.aclosing(frames):
        try:
            async for frame in frames:
                if frame and not begun:
                    begun = True
                    await send({"type": "http.response.start", "status": 200, "headers": raw})
                if frame:
                    await send({"type": "http.response.body", "body": frame, "more_body": True})
        except ApiError as error:
            if not begun:
                raise
            await send({"type": "http.response.body", "body": shapes.sse(error.body), "more_body": True})
    await send({"type": "http.response.body", "body": b""})


class Answer:
    """An ASGI response that ends with its client: one that leaves cancels the work, streamed or not."""

    def __init__(self, tell: Callable[[Scope, Receive, Send], Awaitable[None]], stopping: asyncio.Event) -> None:
        self._tell = tell
        self._stopping = stopping
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def noting(message: Message) -> None:
            self._begun = True
            await send(message)

        telling = asyncio.ensure_future(self._tell_or_refuse(scope, receive, noting))
        leaving = asyncio.ensure_future(client_left(receive))
        stopping = asyncio.ensure_future(self._stopping.wait())
        tasks = (telling, leaving, stopping)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if stopping.done() and not (telling.done() or leaving.done()):
                telling.cancel()
                await asyncio.gather(telling, return_exceptions=True)
                await self._say_stopping(scope, receive, send)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        if isinstance(results[0], Exception):
            raise results[0]

    async def _tell_or_refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._tell(scope, receive, send)
        except ApiError as error:
            await refusal(error)(scope, receive, send)

    async def _say_stopping(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._begun:
            await send({"type": "http.response.body", "body": shapes.sse(STOPPING)})
        else:
            await JSONResponse(STOPPING, 503)(scope, receive, send)


async def client_left(receive: Receive) -> None:
    """Return when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def refusal(error: ApiError) -> JSONResponse:
    """The error as a response."""
    headers = {"Retry-After": "1"} if error.status == 503 else None
    return JSONResponse(error.body, error.status, headers=headers)


# --- routes ---------------------------------------------------------------------------------------------------------


async def json_body(request: Request) -> Json:
    """The request's JSON object; ApiError 413 when it is too large, 400 when it is none."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise ApiError(413, f"the request body is larger than {MAX_BODY_BYTES} bytes")
        parts.append(part)
    try:
        body = json.loads(b"".join(parts))
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the request body is no JSON: {error}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the request body must be a JSON object")
    return body


def service_of(request: Request) -> Service:
    """The service of this application."""
    return request.app.state.service


async def chat(request: Request) -> Answer:
    """POST /v1/chat/completions."""
    service, body = service_of(request), await json_body(request)
    call, prompt = rendered(service, body)
    tools = () if call.forced_tools else tuple(json.dumps({"type": "function", **tool}) for tool in call.tools)
    job = Job(prompt=prompt, sampling=call.sampling, tools=tools)
    plan = Plan(
        head=service.head(chat=True),
        jobs=[job] * call.n,
        n=call.n,
        stream=call.stream,
        include_usage=call.include_usage,
        forced=bool(call.forced_tools),
    )
    unseen = call.tools and not service.model.template.shows_tools
    return service.answer(plan, {"x-switchyard-warning": "the chat template shows no tools"} if unseen else None)


def rendered(service: Service, body: Json) -> tuple[shapes.ChatCall, str]:
    """A checked chat request and the prompt that the model's template makes of it."""
    shapes.check_model(body, service.model_id)
    call = shapes.parse_chat(body)
    try:
        return call, service.model.template.render(call.messages, call.tools or None, call.template_arguments)
    except TemplateRefused as error:
        raise shapes.bad("messages", str(error)) from None


async def input_tokens(request: Request) -> JSONResponse:
    """POST /v1/chat/completions/input_tokens, as llama.cpp has it: the prompt's tokens without generating any."""
    service, body = service_of(request), await json_body(request)
    _, prompt = rendered(service, body)
    n_tokens = await asyncio.to_thread(service.model.count, prompt)
    return JSONResponse({"object": "response.input_tokens", "input_tokens": n_tokens})


async def complete(request: Request) -> Answer:
    """POST /v1/completions."""
    service, body = service_of(request), await json_body(request)
    shapes.check_model(body, service.model_id)
    call = shapes.parse_completion(body)
    prompts = [one if isinstance(one, str) else service.model.detokenize(one) for one in call.prompts]
    plan = Plan(
        head=service.head(chat=False),
        jobs=[Job(prompt=prompt, sampling=call.sampling) for prompt in prompts for _ in range(call.n)],
        n=call.n,
        stream=call.stream,
        include_usage=call.include_usage,
        echoes=tuple(prompts) if call.echo else (),
    )
    return service.answer(plan)


async def models(request: Request) -> JSONResponse:
    """GET /v1/models: the one model, with its usable context as `meta.n_ctx`."""
    service = service_of(request)
    model = service.model
    meta = {
        "n_ctx": model.context,
        "n_ctx_train": model.trained_context,
        "n_vocab": len(model.vocabulary.tokens) or None,
    }
    entry = {"id": service.model_id, "object": "model", "created": service.started, "owned_by": "mistral.rs"}
    return JSONResponse({"object": "list", "data": [{**entry, "meta": meta}]})


async def props(request: Request) -> JSONResponse:
    """GET /props, as far as a client of llama.cpp's server looks: the context and the template."""
    service = service_of(request)
    return JSONResponse(
        {
            "default_generation_settings": {"n_ctx": service.model.context},
            "total_slots": service.slots,
            "model_alias": service.model_id,
            "chat_template": service.model.template.source,
            "build_info": f"mistralrs {importlib.metadata.version('mistralrs')}",
        }
    )


async def health(request: Request) -> JSONResponse:
    """GET /health: 200 once the model is loaded; before that nothing of this application runs."""
    return JSONResponse({"status": "ok"})


async def metrics(request: Request) -> PlainTextResponse:
    """GET /metrics: counters for Prometheus."""
    service = service_of(request)
    return PlainTextResponse(service.counters.text(service.turns), media_type="text/plain; version=0.0.4")


async def tokenize(request: Request) -> JSONResponse:
    """POST /tokenize, as llama.cpp has it."""
    body = await json_body(request)
    content = body.get("content")
    if not isinstance(content, str):
        raise shapes.bad("content", "must be a string")
    add_special = bool(body.get("add_special", False))
    return JSONResponse({"tokens": await asyncio.to_thread(service_of(request).model.tokenize, content, add_special)})


async def detokenize(request: Request) -> JSONResponse:
    """POST /detokenize, as llama.cpp has it."""
    tokens = (await json_body(request)).get("tokens")
    if not isinstance(tokens, list) or any(type(token) is not int for token in tokens):
        raise shapes.bad("tokens", "must be a list of token ids")
    return JSONResponse({"content": await asyncio.to_thread(service_of(request).model.detokenize, tokens)})


async def embeddings(request: Request) -> JSONResponse:
    """POST /v1/embeddings: 501, a GGUF chat model has none in this engine."""
    raise ApiError(501, "this server does not serve embeddings", type="not_supported_error")


async def on_api_error(request: Request, error: Exception) -> JSONResponse:
    """An ApiError raised by a route."""
    assert isinstance(error, ApiError)
    return refusal(error)


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """404 and 405 of the router, as OpenAI's error object."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(ApiError(error.status_code, message).body, error.status_code, headers=error.headers)


async def on_bug(request: Request, error: Exception) -> JSONResponse:
    """Anything unforeseen: 500 with the first line."""
    return refusal(ApiError(500, first_line(error), type="server_error"))


class KeyRequired:
    """Lets through what carries the key, and /health; compares in constant time."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in ("/health", "/v1/health") or self._carries_key(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(401, "Invalid API key", type="authentication_error", code="invalid_api_key")
        await refusal(error)(scope, receive, send)

    def _carries_key(self, scope: Scope) -> bool:
        headers = dict(scope["headers"])
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        offered = token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        return hmac.compare_digest(offered, self._key)


def application(service: Service, key: str | None) -> ASGIApp:
    """The ASGI application."""
    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/chat/completions/input_tokens", input_tokens, methods=["POST"]),
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/v1/embeddings", embeddings, methods=["POST"]),
        Route("/v1/models", models),
        Route("/models", models),
        Route("/props", props),
        Route("/metrics", metrics),
        Route("/health", health),
        Route("/v1/health", health),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
    ]
    handlers: Any = {ApiError: on_api_error, HTTPException: on_http_error, Exception: on_bug}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.state.service = service
    return KeyRequired(app, key) if key else app


# --- the process ----------------------------------------------------------------------------------------------------


class WaitingRoom:
    """A forked child that answers 503 on the listening socket until `close`; it ends with its parent.

    The wheel holds Python's global lock while it loads, so no thread of this process can answer then.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._alive, self._hold = os.pipe()
        self._child = os.fork()
        if self._child == 0:
            os.close(self._hold)
            with contextlib.suppress(BaseException):
                self._serve(listener)
            os._exit(0)
        os.close(self._alive)

    def close(self) -> None:
        """End the child; connections that it has not accepted wait for this process."""
        os.close(self._hold)
        os.waitpid(self._child, 0)

    def _serve(self, listener: socket.socket) -> None:
        while True:
            readable, _, _ = select.select([listener.fileno(), self._alive], [], [])
            if self._alive in readable:
                return
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    self._answer(connection)

    @staticmethod
    def _answer(connection: socket.socket) -> None:
        connection.settimeout(1.0)
        connection.recv(65536)
        body = json.dumps(LOADING).encode()
        head = (
            "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(0.2)  # what the client still sends must be read, or a reset would eat the answer
        while connection.recv(65536):
            pass


class HttpServer(uvicorn.Server):
    """Uvicorn that ends at once on SIGTERM: clients are told, then the process goes, whatever the engine is doing."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        """Install our own handlers in place of uvicorn's."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        yield

    def _stop(self) -> None:
        if self._service.stopping.is_set():
            os._exit(0)
        self._service.stopping.set()
        say("stopping")
        self.should_exit = True
        asyncio.get_running_loop().call_later(STOP_GRACE_S, os._exit, 0)


def say(line: str) -> None:
    """One line for whoever reads the log."""
    print(line, file=sys.stderr, flush=True)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; OSError when the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen(1024)
    listener.setblocking(False)
    return listener


def is_loopback(host: str) -> bool:
    """True when only this machine can reach *host*."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m engines.hosts.mistral_rs", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--gguf", type=Path, required=True, help="model file; of a split model the first part")
    parser.add_argument("--model-id", required=True, help="the name by which clients ask for the model")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1", help=f"other than loopback only with a key in {KEY_VARIABLE}")
    parser.add_argument("--context", type=int, help="usable context of one sequence, in tokens (default: the model's)")
    parser.add_argument(
        "--parallel", type=int, default=1, help="sequences at the same time; on the CPU they take turns"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: the engine's)")
    parser.add_argument("--seed", type=int, help="seed of the process; the engine has none on the CPU")
    parser.add_argument("--tokenizer-json", type=Path, help="a tokenizer.json instead of the GGUF's own")
    parser.add_argument("--chat-template", type=Path, help="a Jinja file instead of the GGUF's own template")
    parser.add_argument("--prefix-cache", type=int, help="sequences kept in the prefix cache; 0 = off")
    parser.add_argument("--cpu", action="store_true", help="keep off the GPU")
    return parser


def check(arguments: argparse.Namespace, key: str | None) -> None:
    """BadInput for arguments that cannot be served."""
    if not is_loopback(arguments.host) and not key:
        raise BadInput(f"--host {arguments.host} is open to others: set a key in {KEY_VARIABLE}, or use 127.0.0.1")
    for name in ("context", "parallel", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise BadInput(f"--{name} {value}: must be at least 1")
    for name in ("chat_template", "tokenizer_json"):
        file = getattr(arguments, name)
        if file is not None and not file.is_file():
            raise BadInput(f"--{name.replace('_', '-')} {file}: there is no such file")
    if not 1 <= arguments.port <= 65535:
        raise BadInput(f"--port {arguments.port}: must be from 1 to 65535")


def prepare(arguments: argparse.Namespace) -> None:
    """Settle what depends on the device, and the environment that the engine reads at import."""
    if arguments.threads:
        os.environ["RAYON_NUM_THREADS"] = os.environ["CANDLE_NUM_THREADS"] = str(arguments.threads)
    if arguments.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    arguments.serial = on_cpu(arguments.cpu)
    arguments.slots = 1 if arguments.serial else arguments.parallel
    if arguments.serial and arguments.parallel > 1:
        say(f"--parallel {arguments.parallel}: on the CPU generations take turns")
    if arguments.serial and arguments.seed is not None:
        say(f"--seed {arguments.seed}: not honoured, this engine cannot seed its CPU sampler")


def load(arguments: argparse.Namespace, listener: socket.socket) -> Model:
    """The loaded model; while it loads, the port answers 503. Ends the process with 1 when loading fails."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handlers wait for the lock that loading holds
    room = WaitingRoom(listener) if hasattr(os, "fork") else None
    say(f"loading {arguments.gguf.name} with mistralrs {importlib.metadata.version('mistralrs')}")
    try:
        model = Model(arguments)
    except BaseException as error:
        say(f"error: cannot load {arguments.gguf}: {first_line(error)}")
        os._exit(1)
    if room:
        room.close()
    return model


async def serve(arguments: argparse.Namespace, model: Model, key: str | None, listener: socket.socket) -> None:
    """Serve until a signal ends it."""
    service = Service(model, arguments.model_id, arguments.slots)
    config = uvicorn.Config(
        application(service, key), log_config=None, access_log=False, lifespan="off", timeout_keep_alive=75
    )
    say(f"model loaded, context {model.context} tokens")
    say(f"listening on http://{arguments.host}:{arguments.port}")
    await HttpServer(config, service).serve(sockets=[listener])


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 ended by a signal once ready, 1 the port is taken or the model does not load, 2 bad arguments."""
    arguments = parser().parse_args(argv)
    key = os.environ.pop(KEY_VARIABLE, "") or None
    try:
        check(arguments, key)
        prepare(arguments)
    except (BadInput, importlib.metadata.PackageNotFoundError) as error:
        say(f"error: {error}")
        return 2
    try:
        listener = listen(arguments.host, arguments.port)
    except OSError as error:
        say(f"error: cannot listen on {arguments.host}:{arguments.port}: {error}")
        return 1
    asyncio.run(serve(arguments, load(arguments, listener), key, listener))
    sys.stderr.flush()
    os._exit(0)  # a worker thread may still sit in the engine


if __name__ == "__main__":
    sys.exit(main())
