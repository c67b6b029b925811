"""One stretch of a soak: ask a turn, and count its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from engines.client.client import client_session, stream_chat
from engines.client.record import StreamRecord
from engines.settings import Endpoint

STALL_S = 60.0
MEMORY_EVERY_S = 1.0
DYING_S = 5.0


def empty_segment(carried: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """A segment of no exposure, with the failures that are known before it begins."""
    return {
        "exposure_s": 0.0,
        "requests": 0,
        "kinds": {},
        "failures": [dict(failure) for failure in carried],
        "restarts": 0,
        "silent_empty": 0,
        "ttft_ms": [],
        "decode_tok_s": [],
        "prompt_tokens": [],
    }


def ask(endpoint: Endpoint, body: dict[str, Any], leave_after: int | None) -> StreamRecord:
    """The record of one turn; the client leaves after `leave_after` chunks, where given."""

    async def one() -> StreamRecord:
        async with client_session() as session:
            return await stream_chat(session, endpoint, body, cancel_after_chunks=leave_after, stall_s=STALL_S)

    return asyncio.run(one())


def count_turn(segment: dict[str, Any], kind: str) -> None:
    """Count one request of this kind of turn."""
    segment["requests"] += 1
    segment["kinds"][kind] = segment["kinds"].get(kind, 0) + 1


def count_answer(segment: dict[str, Any], record: StreamRecord, kind: str, at_s: float) -> None:
    """Count the answer to a turn: a failure, an empty answer, or its speed."""
    if not record.ok:
        segment["failures"].append(failure_of(record, kind, at_s))
    elif not record.cancelled:
        segment["silent_empty"] += not record.text and not record.tool_calls
        segment["ttft_ms"].append(record.measured("ttft_ms"))
        segment["decode_tok_s"].append(record.measured("decode_tok_s"))
        segment["prompt_tokens"].append(record.prompt_tokens)


def failure_of(record: StreamRecord, kind: str, at_s: float) -> dict[str, Any]:
    """A failed turn, as a segment lists it."""
    return {"at_s": at_s, "type": record.error_type, "error": record.error, "turn": kind}
