"""mistral.rs inside the program: requests in, answers and streams out, in OpenAI's shapes and without any HTTP.

`engines.mistral_rs.host` is a server around it, `engines.mistral_rs.native.worker` a process that the yard talks to.

What it cannot honour: `seed` of a request (read and ignored; the wheel's sampler starts from a constant),
`parallel_tool_calls` for forced calls (one call), calls streamed piece by piece (they come whole), images, embeddings,
`suffix`. A missing `max_tokens` means the rest of the context, for /v1/completions too. Where a stop string ends a
generation, `usage` counts the tokens until then, except control tokens amid the text: the wheel does not report them.
A forced call and the reasoning of a model are not searched for stop strings.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field

from engines.mistral_rs.native import requests, responses
from engines.mistral_rs.native.chat_template import TemplateRefused
from engines.mistral_rs.native.generation import (
    Admitted,
    Counters,
    Pieces,
    Turns,
    count_endings,
    count_tokens,
    generate,
    keep_alive,
    until_stop,
    with_calls,
)
from engines.mistral_rs.native.model import Job, LoadedModel, first_line, new_id
from engines.mistral_rs.native.requests import ApiError, Json
from engines.mistral_rs.native.responses import Piece
from engines.openai.sse import DONE, write_event

KEEP_ALIVE_S = 10.0
Frames = AsyncGenerator[bytes, None]


@dataclass(frozen=True)
class EngineResponse:
    """An answer: JSON or text in one piece, or the frames of a stream.

    A frame may be empty (nothing to send yet), and the frames may raise ApiError: before the first that is not empty,
    it is a response with a status; later it is an event of the stream.
    """

    content: Json | str | Frames
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> bytes:
        assert isinstance(self.content, dict | str)
        text = self.content if isinstance(self.content, str) else json.dumps(self.content, ensure_ascii=False)
        return text.encode()


def refusal(error: BaseException) -> EngineResponse:
    """The error as an answer; anything unforeseen is a 500 with its first line."""
    if not isinstance(error, ApiError):
        error = ApiError(500, first_line(error), type="server_error")
    return EngineResponse(error.body, error.status, {"Retry-After": "1"} if error.status == 503 else {})


async def in_stream(frames: Frames) -> Frames:
    """The frames that are not empty. An ApiError after the first of them becomes an event, and the stream ends."""
    begun = False
    async with contextlib.aclosing(frames):
        try:
            async for frame in frames:
                if frame:
                    begun = True
                    yield frame
        except ApiError as error:
            if not begun:
                raise
            yield write_event(error.body)


def json_body(data: bytes) -> Json:
    """A request's JSON object; ApiError 400 when it is none."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the request body is no JSON: {error}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the request body must be a JSON object")
    return body


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What one request makes the engine do: its jobs, one per choice, and the form of the response."""

    head: responses.Head
    jobs: list[Job]
    n: int
    stream: bool
    include_usage: bool
    forced: bool = False
    echoes: tuple[str, ...] = ()

    def echo(self, index: int) -> str:
        """The prompt that is repeated before the text of choice *index*; mostly empty."""
        return self.echoes[index // self.n] if self.echoes else ""


class Native:
    def __init__(self, model: LoadedModel, model_id: str, slots: int) -> None:
        self.model = model
        self.model_id = model_id
        self.slots = slots
        self.started = int(time.time())
        self.turns = Turns(slots)
        self.counters = Counters()
        self._answers: dict[tuple[str, str], Callable[[Json], Awaitable[EngineResponse]]] = {
            ("POST", "/v1/chat/completions"): self._chat,
            ("POST", "/v1/chat/completions/input_tokens"): self._input_tokens,
            ("POST", "/v1/completions"): self._complete,
            ("POST", "/v1/embeddings"): self._embeddings,
            ("POST", "/tokenize"): self._tokenize,
            ("POST", "/detokenize"): self._detokenize,
            ("GET", "/v1/models"): self._models,
            ("GET", "/models"): self._models,
            ("GET", "/props"): self._props,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/health"): self._health,
            ("GET", "/v1/health"): self._health,
        }

    @property
    def routes(self) -> list[tuple[str, str]]:
        return list(self._answers)

    async def ask(self, method: str, path: str, body: Json) -> EngineResponse:
        """The answer to one request. Raises ApiError; cancelled, it leaves the engine."""
        if (method, path) not in self._answers:
            raise ApiError(404, f"{method} {path}: Not Found")
        return await self._answers[method, path](body)

    def pieces(self, request: GenerationRequest, job: Job) -> Pieces:
        made = count_tokens(generate(self.model, self.turns, job), self.counters)
        pieces = with_calls(made, job, request.forced)
        if job.sampling.stop:
            pieces = until_stop(pieces, job.sampling.stop)
        return count_endings(pieces, self.counters)

    async def whole(self, request: GenerationRequest) -> Json:
        """The response body of a request that is not streamed; choices are generated one after the other."""
        choices, usages = [], []
        for index, job in enumerate(request.jobs):
            async with contextlib.aclosing(self.pieces(request, job)) as arriving:
                pieces = [piece async for piece in arriving if isinstance(piece, Piece)]
            choices.append(responses.whole_choice(request.head, index, pieces, request.echo(index)))
            usages += [piece.usage for piece in pieces if piece.usage]
        body = request.head.body(stream=False, choices=choices)
        return body | {"usage": responses.usage_body(usages, request.n), "timings": responses.timings_body(usages)}

    async def frames(self, request: GenerationRequest) -> AsyncGenerator[bytes, None]:
        """The SSE frames of a streamed request; an empty one when the first choice has been admitted."""
        usages: list[responses.Usage] = []
        for index, job in enumerate(request.jobs):
            chat, echo = request.head.chat, request.echo(index)
            opening = [responses.choice(index, delta={"role": "assistant", "content": ""})] if chat else []
            if echo:
                opening.append(responses.choice(index, text=echo))
            offset, finish = len(echo), "stop"
            async with contextlib.aclosing(self.pieces(request, job)) as arriving:
                async for piece in arriving:
                    if isinstance(piece, Admitted):
                        yield b""
                        continue
                    for choice in [*opening, responses.piece_choice(request.head, index, piece, offset)]:
                        if choice:
                            yield write_event(request.head.body(stream=True, choices=[choice]))
                    opening, offset, finish = [], offset + len(piece.content), piece.finish or finish
                    usages += [piece.usage] if piece.usage else []
            empty: Json = {"delta": {}} if chat else {"text": ""}
            closing = request.head.body(stream=True, choices=[responses.choice(index, finish=finish, **empty)])
            last = index == len(request.jobs) - 1
            timings = {"timings": responses.timings_body(usages)} if last and not request.include_usage else {}
            yield write_event(closing | timings)
        if request.include_usage:
            body = request.head.body(stream=True, choices=[])
            totals = {"usage": responses.usage_body(usages, request.n), "timings": responses.timings_body(usages)}
            yield write_event(body | totals)
        yield DONE

    async def _answer(self, request: GenerationRequest, headers: dict[str, str] | None = None) -> EngineResponse:
        content = keep_alive(self.frames(request), KEEP_ALIVE_S) if request.stream else await self.whole(request)
        return EngineResponse(content, headers=headers or {})

    def head(self, chat: bool) -> responses.Head:
        identifier = new_id("chatcmpl-" if chat else "cmpl-")
        return responses.Head(id=identifier, created=int(time.time()), model=self.model_id, chat=chat)

    async def _chat(self, body: Json) -> EngineResponse:
        call, prompt = self._rendered(body)
        tools = () if call.forced_tools else tuple(json.dumps({"type": "function", **tool}) for tool in call.tools)
        job = Job(prompt=prompt, sampling=call.sampling, tools=tools)
        request = GenerationRequest(
            head=self.head(chat=True),
            jobs=[job] * call.n,
            n=call.n,
            stream=call.stream,
            include_usage=call.include_usage,
            forced=bool(call.forced_tools),
        )
        unseen = bool(call.tools) and not self.model.template.shows_tools
        return await self._answer(
            request, {"x-switchyard-warning": "the chat template shows no tools"} if unseen else {}
        )

    def _rendered(self, body: Json) -> tuple[requests.ChatCall, str]:
        requests.check_model(body, self.model_id)
        call = requests.parse_chat(body)
        try:
            return call, self.model.template.render(call.messages, call.tools or None, call.template_arguments)
        except TemplateRefused as error:
            raise requests.bad("messages", str(error)) from None

    async def _input_tokens(self, body: Json) -> EngineResponse:
        """As llama.cpp has it: the prompt's tokens without generating any."""
        _, prompt = self._rendered(body)
        n_tokens = await asyncio.to_thread(self.model.count, prompt)
        return EngineResponse({"object": "response.input_tokens", "input_tokens": n_tokens})

    async def _complete(self, body: Json) -> EngineResponse:
        requests.check_model(body, self.model_id)
        call = requests.parse_completion(body)
        prompts = [one if isinstance(one, str) else self.model.detokenize(one) for one in call.prompts]
        request = GenerationRequest(
            head=self.head(chat=False),
            jobs=[
                Job(prompt=prompt, sampling=call.sampling, keeps_space=True)
                for prompt in prompts
                for _ in range(call.n)
            ],
            n=call.n,
            stream=call.stream,
            include_usage=call.include_usage,
            echoes=tuple(prompts) if call.echo else (),
        )
        return await self._answer(request)

    async def _models(self, _: Json) -> EngineResponse:
        model = self.model
        meta = {
            "n_ctx": model.context,
            "n_ctx_train": model.trained_context,
            "n_vocab": len(model.vocabulary.tokens) or None,
        }
        entry = {"id": self.model_id, "object": "model", "created": self.started, "owned_by": "mistral.rs"}
        return EngineResponse({"object": "list", "data": [{**entry, "meta": meta}]})

    async def _props(self, _: Json) -> EngineResponse:
        """As far as a client of llama.cpp's server looks: the context and the template."""
        return EngineResponse(
            {
                "default_generation_settings": {"n_ctx": self.model.context},
                "total_slots": self.slots,
                "model_alias": self.model_id,
                "chat_template": self.model.template.source,
                "build_info": f"mistralrs {importlib.metadata.version('mistralrs')}",
            }
        )

    async def _health(self, _: Json) -> EngineResponse:
        return EngineResponse({"status": "ok"})

    async def _metrics(self, _: Json) -> EngineResponse:
        return EngineResponse(self.counters.text(self.turns), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def _tokenize(self, body: Json) -> EngineResponse:
        content = body.get("content")
        if not isinstance(content, str):
            raise requests.bad("content", "must be a string")
        add_special = bool(body.get("add_special", False))
        return EngineResponse({"tokens": await asyncio.to_thread(self.model.tokenize, content, add_special)})

    async def _detokenize(self, body: Json) -> EngineResponse:
        tokens = body.get("tokens")
        if not isinstance(tokens, list) or any(type(token) is not int for token in tokens):
            raise requests.bad("tokens", "must be a list of token ids")
        return EngineResponse({"content": await asyncio.to_thread(self.model.detokenize, tokens)})

    async def _embeddings(self, _: Json) -> EngineResponse:
        raise ApiError(501, "this server does not serve embeddings", type="not_supported_error")
