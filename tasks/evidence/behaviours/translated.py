"""A client's requests in an engine's dialect, and its answers back: an engine as clients meet it behind the yard."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, Protocol

import httpx

from engines.openai.call import Call, Refusal, parse
from engines.openai.dialect import Dialect

OF_ITS_BYTES = frozenset({"content-length", "content-encoding", "transfer-encoding"})


class Speaks(Protocol):
    def __call__(self, call: Call, served_name: str) -> Dialect:
        """What translates `call`."""


class Translated(httpx.BaseTransport):
    """Sends over `inner` what each POST is in the engine's dialect; what that refuses is refused here.

    The model is left as it was asked for: which names there are is the yard's to say. `prefix` is the path of the
    server's own address.
    """

    def __init__(self, speaks: Speaks, model_id: str, prefix: str, inner: httpx.BaseTransport) -> None:
        self._speaks, self._model_id, self._prefix, self._inner = speaks, model_id, prefix, inner

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if request.method != "POST":
            return self._inner.handle_request(request)
        path, kind = request.url.path.removeprefix(self._prefix), request.headers.get("content-type", "")
        try:
            call = parse(path, request.read(), kind)
            dialect = self._speaks(call, call.model or self._model_id)
            content = dialect.request()
        except Refusal as refusal:
            return httpx.Response(refusal.status, json=refusal.body())
        headers = {**_without(request.headers), "accept-encoding": "identity"}
        sent = httpx.Request("POST", request.url, headers=headers, content=content, extensions=request.extensions)
        answer = self._inner.handle_request(sent)
        if call.stream and answer.status_code == 200:
            return _streamed(answer, dialect)
        status, data = dialect.whole(answer.status_code, answer.read())
        return httpx.Response(status, headers=_without(answer.headers), content=data)

    def close(self) -> None:
        self._inner.close()


class _Pieces(httpx.SyncByteStream):
    def __init__(self, pieces: Iterator[bytes], answer: httpx.Response) -> None:
        self._pieces, self._answer = pieces, answer

    def __iter__(self) -> Iterator[bytes]:
        return self._pieces

    def close(self) -> None:
        self._answer.close()


def _streamed(answer: httpx.Response, dialect: Dialect) -> httpx.Response:
    """The stream as it is translated; an answer in one piece where it began with an error."""
    headers, pieces = _without(answer.headers), _translated(answer, dialect)
    begun = next(pieces, b"") if dialect.changes_streams else b""
    if dialect.early_error is not None:
        answer.close()
        status, data = dialect.early_error
        return httpx.Response(status, headers={"content-type": "application/json"}, content=data)
    return httpx.Response(200, headers=headers, stream=_Pieces(chain([begun] if begun else [], pieces), answer))


def _translated(answer: httpx.Response, dialect: Dialect) -> Iterator[bytes]:
    for chunk in answer.iter_raw():
        data = dialect.event(chunk) if dialect.changes_streams else chunk
        if dialect.early_error is not None:
            return
        if data:
            yield data
    if rest := dialect.rest():
        yield rest


def _without(headers: httpx.Headers) -> dict[str, Any]:
    """Headers but for those of the body's bytes, which are others now."""
    return {name: value for name, value in headers.items() if name not in OF_ITS_BYTES}
