"""Requests to an OpenAI-style server and their answers, unjudged: status, JSON, the chunks of a stream."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any, Self

import httpx

from engines.openai.call import GENERATING
from engines.openai.sse import DONE_DATA, payloads
from engines.redaction import redacted_text
from engines.settings import Endpoint
from tasks.evidence.behaviours.translated import Translated

Json = dict[str, Any]
Messages = str | list[Json]
READ_TIMEOUT_S = 60.0
# what reading an answer raises that has another shape than every client of the API expects
UNREADABLE = (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError)


class Refused(Exception):
    """A request that had to be served was answered with another status than 200."""

    def __init__(self, reply: ApiReply) -> None:
        super().__init__(f"HTTP {reply.status}: {reply.error_text}")
        self.reply = reply


class Malformed(Exception):
    """A 200 whose body lacks what every client of the API reads."""


@dataclass(frozen=True)
class ApiReply:
    """One complete answer; `body` is None when it is not JSON."""

    status: int
    raw: str
    body: Any

    @property
    def error(self) -> Json:
        """The `error` object of an OpenAI error body; empty when there is none."""
        error = self.body.get("error") if isinstance(self.body, dict) else None
        return error if isinstance(error, dict) else {}

    @property
    def error_text(self) -> str:
        """The server's own message, on one line of at most 160 characters."""
        message = self.error.get("message")
        return redacted_text(" ".join(str(message or self.raw or "(empty body)").split()))[:160]

    def served(self) -> ApiReply:
        """This reply; raises Refused unless it is a 200 and Malformed unless it is a JSON object."""
        if self.status != 200:
            raise Refused(self)
        if not isinstance(self.body, dict):
            raise Malformed(f"200 without a JSON object: {redacted_text(self.raw)[:80]!r}")
        return self

    @property
    def choice(self) -> Json:
        """The first choice; Malformed without one."""
        choices = self.served().body.get("choices")
        if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
            raise Malformed(f"no choices in {self.raw[:120]!r}")
        return choices[0]

    @property
    def message(self) -> Json:
        """The first choice's message; Malformed without one."""
        message = self.choice.get("message")
        if not isinstance(message, dict):
            raise Malformed(f"no message in {self.raw[:120]!r}")
        return message

    @property
    def text(self) -> str:
        """The first choice's text; empty when its content is null."""
        return self.message.get("content") or ""

    @property
    def finish(self) -> str | None:
        """The first choice's finish_reason."""
        return self.choice.get("finish_reason")

    @property
    def tool_calls(self) -> list[Json]:
        """The first choice's tool calls; empty when there are none."""
        return self.message.get("tool_calls") or []

    def used(self, key: str) -> int:
        """`usage[key]`, in tokens; Malformed when it is missing or no integer."""
        return count(self.served().body.get("usage"), key)


@dataclass
class Streamed:
    """One streamed answer as far as it was read; `refusal` holds a refusal that came instead of a stream.

    The first choice of every chunk that has one is in `choices`, its delta in `deltas`; `finishes`, `usages` and
    `tool_pieces` are those that are not null, in order, and `undecodable` the events that are no JSON object.
    """

    content_type: str = ""
    chunks: list[Json] = field(default_factory=list)
    choices: list[Json] = field(default_factory=list)
    deltas: list[Json] = field(default_factory=list)
    finishes: list[str | None] = field(default_factory=list)
    usages: list[Json] = field(default_factory=list)
    tool_pieces: list[Json] = field(default_factory=list)
    undecodable: list[str] = field(default_factory=list)
    arrivals_s: list[float] = field(default_factory=list)
    text: str = ""
    error: Json | None = None
    done: bool = False
    after_done: int = 0
    refusal: ApiReply | None = None

    def served(self) -> Streamed:
        """This stream; raises Refused when the server refused it, before or after its 200."""
        if self.refusal is not None:
            raise Refused(self.refusal)
        if self.error:
            raise Refused(ApiReply(200, json.dumps(self.error), self.error))
        return self

    def take(self, data: bytes) -> None:
        """Add one event's payload."""
        if data == DONE_DATA:
            self.done = True
            return
        self.after_done += self.done
        try:
            chunk = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError):
            self.undecodable.append(data[:80].decode("utf-8", "replace"))
            return
        if not isinstance(chunk, dict):
            self.undecodable.append(str(chunk)[:80])
            return
        self.chunks.append(chunk)
        if "error" in chunk:
            self.error = self.error or chunk
        if chunk.get("usage"):
            self.usages.append(chunk["usage"])
        if chunk.get("choices"):
            self._take_choice(chunk["choices"][0])

    def _take_choice(self, choice: Json) -> None:
        delta = choice.get("delta") or {}
        self.choices.append(choice)
        self.deltas.append(delta)
        self.tool_pieces += delta.get("tool_calls") or []
        if choice.get("finish_reason"):
            self.finishes.append(choice["finish_reason"])
        if delta.get("content"):
            self.text += delta["content"]
            self.arrivals_s.append(time.monotonic())


def unreadable(error: Exception) -> str:
    """One of UNREADABLE, as what was observed."""
    return f"unreadable answer: {type(error).__name__}: {error}"


def count(usage: object, key: str) -> int:
    """`usage[key]`, in tokens; Malformed when it is missing or no integer."""
    value = usage.get(key) if isinstance(usage, dict) else None
    if not isinstance(value, int):
        raise Malformed(f"usage has no {key}: {usage!r}")
    return value


def user(text: str) -> Json:
    """A user message."""
    return {"role": "user", "content": text}


class Caller:
    """Speaks to one endpoint; every request has a limit on silence, none on its whole length."""

    def __init__(self, endpoint: Endpoint, *, read_timeout_s: float = READ_TIMEOUT_S, verify: bool = True) -> None:
        self.endpoint = endpoint
        # the read limit is for silence between two reads, not for the whole answer
        self.timeout = httpx.Timeout(10.0, read=read_timeout_s)
        # a fresh connection each time: llama-server closes one after a stream; a request sent into that close is lost
        self.http = self.client(endpoint.headers, limits=httpx.Limits(max_keepalive_connections=0), verify=verify)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def client(self, headers: dict[str, str], **options: Any) -> httpx.Client:
        """A further client of the same server, ignoring proxies from the environment; the caller closes it.

        It speaks the engine's dialect, as the yard does.
        """
        url, speaks = self.endpoint.base_url, self.endpoint.speaks
        if speaks is not None:
            inner = httpx.HTTPTransport(trust_env=False, **options)
            transport = Translated(speaks, self.endpoint.model_id, httpx.URL(url).path.rstrip("/"), inner)
            options = {"transport": transport}
        return httpx.Client(base_url=url, headers=headers, timeout=self.timeout, trust_env=False, **options)

    def get(self, path: str) -> ApiReply:
        """The answer to GET `path`."""
        return as_reply(self.http.get(path))

    def post(self, path: str, body: Json | bytes) -> ApiReply:
        """The answer to POST `path`; bytes go out as they are, labelled JSON."""
        if not isinstance(body, bytes) and path in GENERATING:
            body = {**self.endpoint.request_defaults, **body}
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return as_reply(self.http.post(path, content=content, headers={"Content-Type": "application/json"}))

    def body(self, messages: Messages, **params: Any) -> Json:
        """A greedy chat request of at most 8 tokens, unless `params` say otherwise; a None leaves a field out."""
        turns = [user(messages)] if isinstance(messages, str) else messages
        fields = {"model": self.endpoint.model_id, "messages": turns, "temperature": 0, "max_tokens": 8} | params
        fields = self.endpoint.request_defaults | fields
        return {key: value for key, value in fields.items() if value is not None}

    def chat(self, messages: Messages, **params: Any) -> ApiReply:
        """The answer to one chat request."""
        return self.post("/v1/chat/completions", self.body(messages, **params))

    def stream(self, messages: Messages, *, leave_after: int | None = None, **params: Any) -> Streamed:
        """One streamed chat answer, read to its end or until `leave_after` chunks with content have come."""
        body = self.body(messages, stream=True, **params)
        with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                return Streamed(refusal=as_reply(response))
            streamed = Streamed(content_type=response.headers.get("content-type", ""))
            for data in payloads(response.iter_bytes()):
                streamed.take(data)
                if leave_after is not None and len(streamed.arrivals_s) >= leave_after:
                    break
            return streamed


def as_reply(response: httpx.Response) -> ApiReply:
    """`response`, read, with its JSON where it has any."""
    try:
        body = json.loads(response.content)
    except (ValueError, RecursionError):
        body = None
    return ApiReply(response.status_code, response.text, body)
