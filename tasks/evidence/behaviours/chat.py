"""Chat, streams and usage: what every client reads."""

from __future__ import annotations

import json

from engines.units import number_of
from tasks.evidence.behaviours.base import COMMON, COMMON_TOKENS, Asker, Observation, behaviour, failed, holds, passed
from tasks.evidence.behaviours.caller import Json, count, user


@behaviour("chat", "a chat request is answered by an assistant message with text", required=True)
def chat_answer(ask: Asker) -> Observation:
    role, text = ask.plain.message.get("role"), ask.plain.text
    return holds(role == "assistant" and bool(text.strip()), f"role {role}, text {text!r}")


@behaviour("chat", "two answers carry different ids, a creation time and the object name chat.completion")
def chat_ids(ask: Asker) -> Observation:
    first, second = ask.plain.served().body, ask.chat("Hi", max_tokens=1).served().body
    ids, created, name = (first.get("id"), second.get("id")), first.get("created"), first.get("object")
    good = all(ids) and ids[0] != ids[1] and isinstance(created, int) and name == "chat.completion"
    return holds(good, f"ids {ids}, created {created!r}, object {name!r}")


@behaviour("chat", "the answer names the model that was asked for")
def chat_model_name(ask: Asker) -> Observation:
    name = ask.plain.served().body.get("model")
    return holds(name == ask.endpoint.model_id, f"model {name!r}, asked for {ask.endpoint.model_id!r}")


@behaviour("chat", "the system message reaches the model", required=True)
def system_message(ask: Asker) -> Observation:
    return message_reaches_prompt(ask, "system")


@behaviour("chat", "a developer message reaches the model")
def developer_message(ask: Asker) -> Observation:
    return message_reaches_prompt(ask, "developer")


def message_reaches_prompt(ask: Asker, role: str) -> Observation:
    """Whether a longer message of `role` makes the prompt longer by about its words."""
    short, extra = "Be kind.", " Also be brief, honest, calm, clear, warm, and exact."
    sizes = [ask.prompt_tokens([{"role": role, "content": text}, user("Hi")]) for text in (short, short + extra)]
    grown = sizes[1] - sizes[0]
    return holds(
        grown >= len(extra.split()), f"{number_of(len(extra.split()), 'more word')}: {grown} more prompt tokens"
    )


@behaviour("chat", "earlier turns of a conversation reach the model", required=True)
def multi_turn(ask: Asker) -> Observation:
    earlier = [user("My cat is called Tom."), {"role": "assistant", "content": "That is a fine name for a cat."}]
    grown = ask.prompt_tokens([*earlier, user("Hi")]) - ask.prompt_tokens([earlier[0], user("Hi")])
    return holds(grown >= 8, f"an assistant turn of 8 words: {grown} more prompt tokens")


@behaviour("chat", "content given as a list of text parts reads like the same plain string", required=True)
def content_parts(ask: Asker) -> Observation:
    parts = ask.chat([{"role": "user", "content": [{"type": "text", "text": COMMON}]}], max_tokens=COMMON_TOKENS)
    sizes = parts.used("prompt_tokens"), ask.plain.used("prompt_tokens")
    same = sizes[0] == sizes[1] and parts.text == ask.plain.text
    return holds(same, f"prompt tokens {sizes[0]} and {sizes[1]}, texts {parts.text!r} and {ask.plain.text!r}")


@behaviour("chat", "fields the engine does not know (user, metadata, store) change nothing", required=True)
def extra_fields(ask: Asker) -> Observation:
    extra = {"user": "someone", "metadata": {"a": "b"}, "store": False, "x_unknown": 1}
    text = ask.common(**extra).text
    return holds(text == ask.plain.text, f"with {', '.join(extra)}: {text!r}")


@behaviour("chat", "a prompt answered before is answered the same from the prompt cache", required=True)
def cached_prompt(ask: Asker) -> Observation:
    ask.chat(COMMON + " Make it sad.", max_tokens=1).served()
    again = ask.common()
    return holds(again.text == ask.plain.text, f"first {ask.plain.text!r}, later {again.text!r}")


@behaviour("chat", "one connection serves several answers, a stream among them")
def keep_alive(ask: Asker) -> Observation:
    opened: list[str] = []

    def trace(event: str, _: Json) -> None:
        if event == "connection.connect_tcp.started":
            opened.append(event)

    requests: list[tuple[str, str, Json | None]] = [
        ("GET", "/v1/models", None),
        ("POST", "/v1/chat/completions", ask.body("Hi", max_tokens=1, stream=True)),
        ("GET", "/v1/models", None),
    ]
    with ask.client(ask.endpoint.headers) as http:
        for method, path, body in requests:
            answer = http.request(method, path, json=body, extensions={"trace": trace})
            if answer.status_code != 200:
                return failed(f"HTTP {answer.status_code} on a kept connection")
    return holds(len(opened) == 1, f"3 answers over {number_of(len(opened), 'connection')}")


@behaviour("stream", "a streamed answer comes as server-sent events in several pieces of text", required=True)
def stream_pieces(ask: Asker) -> Observation:
    stream = ask.bare_stream
    good = "text/event-stream" in stream.content_type and len(stream.arrivals_s) > 1
    return holds(good, f"{number_of(len(stream.arrivals_s), 'piece')} with text, content type {stream.content_type!r}")


@behaviour("stream", "every chunk is JSON with the shape that client libraries read", required=True)
def stream_shape(ask: Asker) -> Observation:
    for stream in (ask.bare_stream, ask.usage_stream):
        if stream.undecodable:
            return failed(f"not JSON or not UTF-8: {stream.undecodable[0]!r}")
        odd = next((chunk for chunk in stream.chunks if not well_shaped(chunk)), None)
        if odd is not None:
            return failed(f"odd chunk {json.dumps(odd)[:200]}")
    return passed(f"{len(ask.bare_stream.chunks)} and {number_of(len(ask.usage_stream.chunks), 'chunk')}")


def well_shaped(chunk: Json) -> bool:
    """Whether `chunk` is a chat.completion.chunk whose choices all have an index and a delta object.

    An empty list of choices is well shaped only beside usage.
    """
    choices = chunk.get("choices")
    if chunk.get("object") != "chat.completion.chunk" or not isinstance(choices, list):
        return False
    if not choices:
        return isinstance(chunk.get("usage"), dict)
    return all(isinstance(choice.get("delta"), dict) and "index" in choice for choice in choices)


@behaviour("stream", "a streamed answer opens with the assistant role", required=True)
def stream_role_first(ask: Asker) -> Observation:
    first = ask.bare_stream.deltas[0] if ask.bare_stream.deltas else {}
    return holds(first.get("role") == "assistant", f"first delta {json.dumps(first)[:120]}")


@behaviour("stream", "the pieces of a greedy stream join to the text of the complete answer", required=True)
def stream_equals_plain(ask: Asker) -> Observation:
    texts = ask.bare_stream.text, ask.plain.text
    return holds(texts[0] == texts[1], f"streamed {texts[0]!r}, complete {texts[1]!r}")


@behaviour("stream", "a stream ends with [DONE] and nothing after it", required=True)
def stream_done(ask: Asker) -> Observation:
    stream = ask.bare_stream
    return holds(
        stream.done and not stream.after_done, f"[DONE] {stream.done}, {number_of(stream.after_done, 'event')} after it"
    )


@behaviour("stream", "a stream names its finish reason once, after the last piece of text", required=True)
def stream_finish_once(ask: Asker) -> Observation:
    choices = ask.bare_stream.choices
    ends = [place for place, choice in enumerate(choices) if choice.get("finish_reason")]
    texts = [place for place, choice in enumerate(choices) if (choice.get("delta") or {}).get("content")]
    good = len(ends) == 1 and ask.bare_stream.finishes == ["length"] and (not texts or texts[-1] <= ends[0])
    return holds(good, f"finish reasons {ask.bare_stream.finishes} at chunks {ends} of {len(choices)}")


@behaviour("stream", "all chunks of one stream carry the same id")
def stream_one_id(ask: Asker) -> Observation:
    ids = {chunk.get("id") for chunk in ask.bare_stream.chunks}
    return holds(
        len(ids) == 1 and None not in ids,
        f"{number_of(len(ids), 'id')} in {number_of(len(ask.bare_stream.chunks), 'chunk')}",
    )


@behaviour("usage", "prompt and completion tokens add up to the total", required=True)
def usage_adds_up(ask: Asker) -> Observation:
    prompt, completion, total = (ask.plain.used(f"{part}_tokens") for part in ("prompt", "completion", "total"))
    good = prompt > 0 and completion > 0 and prompt + completion == total
    return holds(good, f"{prompt} + {completion} = {total}")


@behaviour("usage", "a stream that asks for usage gets the numbers of the complete answer", required=True)
def usage_in_stream(ask: Asker) -> Observation:
    usages = ask.usage_stream.usages
    if not usages:
        return failed("no chunk carries usage")
    keys = ("prompt_tokens", "completion_tokens")
    streamed, plain = [count(usages[-1], key) for key in keys], [ask.plain.used(key) for key in keys]
    return holds(streamed == plain, f"streamed {streamed}, complete {plain} (prompt, completion)")


@behaviour("usage", "a stream that does not ask for usage gets none")
def usage_only_when_asked(ask: Asker) -> Observation:
    carrying = len(ask.bare_stream.usages)
    return holds(carrying == 0, f"{carrying} of {number_of(len(ask.bare_stream.chunks), 'chunk')} carry usage unasked")
