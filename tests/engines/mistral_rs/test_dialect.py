"""What clients of llama.cpp's server see when another engine answers them."""

import json

import pytest

from engines.driver import Installation
from engines.mistral_rs.dialect import BinaryDialect, HostDialect, error_of, logprobs_of, timings_of
from engines.openai.call import Call, Refusal
from engines.openai.dialect import Dialect
from engines.registry import driver

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
USAGE = {
    "completion_tokens": 2,
    "prompt_tokens": 5,
    "total_tokens": 7,
    "avg_tok_per_sec": 70.0,
    "avg_prompt_tok_per_sec": 100.0,
    "avg_compl_tok_per_sec": 40.0,
    "total_time_sec": 0.1,
    "total_prompt_time_sec": 0.05,
    "total_completion_time_sec": 0.05,
}
TIMINGS = {
    "prompt_n": 5,
    "prompt_ms": 50.0,
    "prompt_per_token_ms": 10.0,
    "prompt_per_second": 100.0,
    "predicted_n": 2,
    "predicted_ms": 50.0,
    "predicted_per_token_ms": 25.0,
    "predicted_per_second": 40.0,
}


def call(body, path=CHAT):
    return Call(path, json.dumps(body).encode(), body)


def binary(body=None, path=CHAT):
    return BinaryDialect(call({"messages": MESSAGES, **(body or {})}, path), "default", "m")


def asked(dialect):
    return json.loads(dialect.request())


def chunk(delta, finish=None, usage=None, logprobs=None):
    body = {
        "id": "3",
        "choices": [{"finish_reason": finish, "index": 0, "delta": delta, "logprobs": logprobs}],
        "created": 1700000000,
        "model": "/models",
        "system_fingerprint": "local",
        "object": "chat.completion.chunk",
        "usage": usage,
    }
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def word(text):
    return {"content": text, "role": "assistant", "tool_calls": None}


STREAM = chunk(word("Hé")) + b":\n\n" + chunk(word("llo"), "stop", USAGE) + b"data: [DONE]\n\n"


def told(stream):
    """The JSON of each event; comments and the end as they are."""
    events = [event.decode() for event in stream.split(b"\n\n") if event]
    return [json.loads(event[6:]) if event.startswith("data: {") else event for event in events]


def deltas(stream):
    return [one["choices"][0]["delta"] for one in told(stream) if isinstance(one, dict) and one["choices"]]


# --- streams of the binary, as bytes


def test_llama_cpp_is_passed_on_untouched():
    dialect = Dialect(call({"model": "m", "messages": MESSAGES}), "m")
    assert type(dialect) is Dialect
    assert not dialect.changes_streams
    assert dialect.request() is dialect.call.raw
    assert dialect.whole(400, b"{") == (400, b"{")


def test_a_stream_becomes_llama_cpps():
    """A role chunk, content without a role, an end of its own that carries the timings, usage only when asked."""
    stream = binary().event(STREAM)
    out = told(stream)
    assert deltas(stream) == [
        {"role": "assistant", "content": None},
        {"content": "Hé"},
        {"content": "llo"},
        {},
    ]
    chunks = [one for one in out if isinstance(one, dict)]
    assert [one["choices"][0]["finish_reason"] for one in chunks] == [None, None, None, "stop"]
    assert not any("usage" in one for one in chunks)
    assert {one["model"] for one in chunks} == {"m"}
    (identifier,) = {one["id"] for one in chunks}
    assert identifier.startswith("chatcmpl-")
    assert [one.get("timings") for one in chunks] == [None, None, None, TIMINGS]
    assert out[2] == ":"
    assert out[-1] == "data: [DONE]"


def test_usage_comes_when_asked_in_a_chunk_without_choices():
    dialect = binary({"stream_options": {"include_usage": True}})
    *_, end, last, done = told(dialect.event(STREAM))
    assert done == "data: [DONE]"
    assert "timings" not in end
    assert (last["choices"], last["timings"]) == ([], TIMINGS)
    assert last["usage"] == {"completion_tokens": 2, "prompt_tokens": 5, "total_tokens": 7}


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": True}}])
def test_a_stream_is_the_same_however_it_is_cut(options):
    def through(*pieces):
        dialect = binary(options)
        dialect._id = "chatcmpl-1"
        return b"".join(dialect.event(piece) for piece in pieces) + dialect.rest()

    whole = through(STREAM)
    assert through(*(STREAM[at : at + 1] for at in range(len(STREAM)))) == whole
    for at in range(len(STREAM)):
        assert through(STREAM[:at], STREAM[at:]) == whole, at


def test_a_complete_event_is_never_held_back():
    dialect = binary()
    first, second = chunk(word("a")), chunk(word("b"))
    assert len(deltas(dialect.event(first + second[:-1]))) == 2
    assert deltas(dialect.event(second[-1:])) == [{"content": "b"}]
    assert dialect.rest() == b""


def test_the_last_event_may_lack_its_empty_line():
    dialect = binary()
    dialect.event(STREAM[:-2])
    assert dialect.rest() == b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    "event",
    [
        b'event: agentic_tool_call_progress\ndata: {"round":0}\n\n',
        b'data: {"choices": \n\n',
        b'data: {"type":"unknown"}\n\n',
        b"id: 7\n\n",
    ],
)
def test_what_is_not_understood_passes_unchanged(event):
    assert binary().event(event) == event


def test_the_first_comment_waits_for_nobody_and_the_others_pass():
    """An error right behind it must still be able to become a 400: a stream that has begun has said 200."""
    dialect = binary()
    assert [dialect.event(b": keep-alive\n\n"), dialect.event(b":\n\n")] == [b"", b":\n\n"]


def test_a_tool_call_in_the_last_chunk_is_told_before_the_end():
    tool = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    last = chunk({"content": None, "role": "assistant", "tool_calls": [tool]}, "tool_calls", USAGE)
    assert deltas(binary().event(last)) == [{"role": "assistant", "content": None}, {"tool_calls": [tool]}, {}]


def test_reasoning_is_kept():
    said = {"content": None, "role": "assistant", "tool_calls": None, "reasoning_content": "hm"}
    assert deltas(binary().event(chunk(said)))[1] == {"reasoning_content": "hm"}


def test_each_choice_has_a_role_chunk_of_its_own():
    two = json.loads(chunk(word("a"))[6:])
    two["choices"].append({**two["choices"][0], "index": 1})
    out = told(binary().event(b"data: " + json.dumps(two).encode() + b"\n\n"))
    assert [(one["choices"][0]["index"], "role" in one["choices"][0]["delta"]) for one in out] == [
        (0, True),
        (0, False),
        (1, True),
        (1, False),
    ]


def test_a_text_completion_ends_in_a_chunk_of_its_own():
    body = {"id": "1", "object": "text_completion", "model": "x", "created": 1}
    choice = {"text": "a", "index": 0, "logprobs": None, "finish_reason": "length"}
    event = b"data: " + json.dumps({**body, "choices": [choice]}).encode() + b"\n\n"
    out = told(binary(path="/v1/completions").event(event))
    assert [(one["choices"][0]["text"], one["choices"][0]["finish_reason"]) for one in out] == [
        ("a", None),
        ("", "length"),
    ]


# --- errors of the binary


@pytest.mark.parametrize(
    "event", [b"data: it broke\n\n", b'data: {"error":{"message":"it broke","type":"server_error"}}\n\n']
)
def test_an_error_in_a_stream_is_an_error_event(event):
    """Raw text up to 0.9.2, an object later."""
    dialect = binary()
    dialect.event(chunk(word("a")))
    assert told(dialect.event(event)) == [{"error": {"code": 500, "message": "it broke", "type": "server_error"}}]
    assert dialect.error == "it broke"
    assert dialect.early_error is None


def test_an_error_instead_of_a_stream_keeps_its_status():
    """llama.cpp refuses too long a prompt with 400, before any event."""
    dialect = binary()
    assert dialect.event(b":\n\n") == b""
    long = b"data: Prompt sequence length is greater than 64, perhaps consider using `truncate_sequence`?\n\n"
    assert dialect.event(long + b"data: [DONE]\n\n") == b""
    status, body = dialect.early_error
    error = json.loads(body)["error"]
    assert (status, error["code"], error["type"], error["n_ctx"]) == (400, 400, "exceed_context_size_error", 64)


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (422, b'{"message":"max_tokens must be at least 1."}', (400, "invalid_request_error")),
        (422, b"Failed to deserialize the JSON body: missing field", (400, "invalid_request_error")),
        (500, b'{"message":"No content was provided, expected tool calls."}', (400, "invalid_request_error")),
        (500, b'{"message":"shape mismatch","partial_response":{"id":"1"}}', (500, "server_error")),
        (404, b"", (404, "not_found_error")),
        (503, b'"busy"', (503, "unavailable_error")),
    ],
)
def test_error_bodies_are_llama_cpps(status, body, expected):
    told_status, data = error_of(status, body)
    error = json.loads(data)["error"]
    assert (told_status, error["type"]) == expected
    assert error["code"] == told_status
    assert set(error) == {"code", "message", "type"}
    assert error["message"]


def test_our_hosts_errors_carry_their_status_as_code():
    data = b'{"error":{"message":"no","type":"invalid_request_error","param":"n","code":null}}'
    status, told_data = HostDialect(call({}), "m").whole(400, data)
    assert (status, json.loads(told_data)["error"]["code"]) == (400, 400)
    assert HostDialect(call({}), "m").whole(502, b"bad gateway") == (502, b"bad gateway")
    assert HostDialect(call({}), "m").whole(200, data) == (200, data)


# --- whole answers of the binary


def test_a_whole_answer_becomes_llama_cpps():
    tool = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = {"content": None, "role": "assistant", "tool_calls": [tool]}
    choice = {"finish_reason": "tool_calls", "index": 0, "message": message, "logprobs": None}
    body = {"id": "1", "choices": [choice], "model": "/models", "object": "chat.completion", "usage": USAGE}
    status, data = binary().whole(200, json.dumps(body).encode())
    answer = json.loads(data)
    assert (status, answer["model"], answer["timings"]) == (200, "m", TIMINGS)
    assert answer["usage"] == {"completion_tokens": 2, "prompt_tokens": 5, "total_tokens": 7}
    (choice,) = answer["choices"]
    assert set(choice) == {"finish_reason", "index", "message"}
    assert choice["message"]["tool_calls"] == [{"id": "c1", "type": "function", "function": tool["function"]}]


def test_logprobs_become_llama_cpps():
    bare = {
        "token": "Hé",
        "logprob": -0.5,
        "bytes": list("Hé".encode()),
        "top_logprobs": [{"token": 7, "logprob": -0.5, "bytes": "Hé"}, {"token": 8, "logprob": -2, "bytes": None}],
    }
    (entry,) = logprobs_of(bare)["content"]
    assert (entry["id"], entry["token"], entry["bytes"]) == (7, "Hé", [72, 195, 169])
    assert entry["top_logprobs"][0] == {"id": 7, "token": "Hé", "bytes": [72, 195, 169], "logprob": -0.5}
    assert entry["top_logprobs"][1] == {"id": 8, "logprob": -2}
    assert logprobs_of({"content": [bare]}) == logprobs_of(bare)
    assert logprobs_of(None) is None


@pytest.mark.parametrize("odd", [None, float("inf"), float("nan"), -1.0, "fast", True])
def test_timings_leave_out_what_was_not_measured(odd):
    timings = timings_of({**USAGE, "total_prompt_time_sec": odd, "avg_prompt_tok_per_sec": odd})
    assert {name for name in timings if name.startswith("prompt")} == {"prompt_n"}
    assert timings["predicted_ms"] == 50.0
    assert timings_of({}) == {}


# --- requests


@pytest.mark.parametrize("dialect", [HostDialect, BinaryDialect])
@pytest.mark.parametrize(
    ("said", "limit"),
    [
        ({}, None),
        ({"n_predict": 2, "max_completion_tokens": 3, "max_tokens": 1}, 2),
        ({"max_completion_tokens": 3, "max_tokens": 1}, 3),
        ({"max_completion_tokens": None, "max_tokens": 1}, 1),
        ({"max_tokens": 0}, 1),
        ({"max_tokens": -1}, None),
        ({"max_tokens": -5}, -5),
        ({"max_tokens": "2"}, "2"),
        ({"n_predict": 2.7}, 2),
    ],
)
def test_token_limits_mean_what_they_meant(dialect, said, limit):
    """As llama-server b10434 answered these: the first of three names, 0 is one token, -1 is none, -5 an error."""
    body = asked(dialect(call({"messages": MESSAGES, **said}), "default"))
    assert body.get("max_tokens") == limit
    assert not {"n_predict", "max_completion_tokens"} & set(body)


@pytest.mark.parametrize("dialect", [HostDialect, BinaryDialect])
def test_llama_cpps_defaults_hold_where_the_client_says_nothing(dialect):
    body = asked(dialect(call({"messages": MESSAGES, "top_p": 0.5, "temperature": None}), "default"))
    assert {name: body[name] for name in ("temperature", "top_k", "top_p", "min_p")} == {
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.5,
        "min_p": 0.05,
    }
    greedy = asked(dialect(call({"messages": MESSAGES, "temperature": -1}), "default"))
    assert (greedy["temperature"], "top_k" in greedy) == (0, False)
    assert "top_k" not in asked(dialect(call({"messages": MESSAGES, "top_k": 0}), "default"))


def test_llama_cpps_own_words_do_not_reach_the_binary():
    own = {"cache_prompt": True, "id_slot": 0, "timings_per_token": True, "logprobs": None, "n": None, "grammar": ""}
    body = asked(binary({**own, "repeat_penalty": 1.1, "model": "gpt-4o", "logit_bias": [[15, -1.5]]}))
    assert not set(own) & set(body)
    assert (body["repetition_penalty"], body["model"], body["logit_bias"]) == (1.1, "default", {"15": -1.5})


@pytest.mark.parametrize("dialect", [HostDialect, BinaryDialect])
def test_a_gbnf_grammar_is_refused(dialect):
    with pytest.raises(Refusal, match="GBNF") as refused:
        dialect(call({"messages": MESSAGES, "grammar": 'root ::= "x"'}), "default").request()
    assert refused.value.status == 400


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@pytest.mark.parametrize("dialect", [Dialect, HostDialect, BinaryDialect])
def test_a_grammar_of_mistral_rs_reaches_every_engine(dialect, path):
    grammar = {"type": "regex", "value": "yes|no"}
    said = {"messages": MESSAGES, "prompt": "a", "grammar": grammar, "response_format": {"type": "text"}}
    body = asked(dialect(call(said, path), "default"))
    assert body["grammar"] == grammar
    assert dialect is not BinaryDialect or "response_format" not in body  # it would refuse the two together


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_a_grammar_beside_a_json_schema_is_refused_for_the_binary(path):
    with pytest.raises(Refusal, match="grammar") as refused:
        binary({"grammar": {"type": "regex", "value": "a"}, "json_schema": {"type": "array"}}, path).request()
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("said", "schema"),
    [
        ({"json_schema": {"type": "array"}}, {"type": "array"}),
        ({"response_format": {"type": "json_object"}}, {"type": "object"}),
        ({"response_format": {"type": "json_object", "schema": {"type": "array"}}}, {"type": "array"}),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "array"}}}}, {"type": "array"}),
    ],
)
def test_every_way_to_ask_for_json_is_a_schema_to_the_binary(said, schema):
    format_ = asked(binary(said))["response_format"]
    assert format_ == {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    completion = asked(BinaryDialect(call({"prompt": ["a"], "logprobs": False, **said}, "/v1/completions"), "default"))
    assert completion["grammar"] == {"type": "json_schema", "value": schema}
    assert completion["prompt"] == "a"
    assert not {"response_format", "logprobs", "json_schema"} & set(completion)


def test_text_parts_are_one_string_to_the_binary():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    image = [{"type": "image_url", "image_url": {"url": "data:"}}]
    body = asked(binary({"messages": [{"role": "system", "content": parts}, {"role": "user", "content": image}]}))
    assert [message["content"] for message in body["messages"]] == ["a\nb", image]


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/v1/chat/completions/input_tokens"])
def test_what_the_binary_does_not_have_is_501(path):
    with pytest.raises(Refusal, match="does not tokenize") as refused:
        binary(path=path).request()
    assert refused.value.status == 501


@pytest.mark.parametrize(
    ("name", "form", "kind"),
    [
        ("llama.cpp", "binary", Dialect),
        ("llama.cpp", "hosted", Dialect),
        ("mistral.rs", "binary", BinaryDialect),
        ("mistral.rs", "hosted", HostDialect),
        ("mistral.rs-native", "native", HostDialect),
    ],
)
def test_each_driver_names_its_dialect(name, form, kind):
    assert driver(name).dialect(Installation(name, form, ("engine",), "1")) is kind


@pytest.mark.parametrize(
    "event", [b'id: 1\ndata: {"choices": []}', b'data: {"choices": []}\nretry: 5', b": note\ndata: x"]
)
def test_an_event_with_more_than_data_passes_untouched(event):
    """Its other lines would be lost in llama.cpp's form."""
    dialect = binary()
    dialect.event(chunk(word("x")))
    assert dialect.event(event + b"\n\n") == event + b"\n\n"
