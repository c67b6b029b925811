"""Requests kept for a replay: what is taken out, what the file may hold, and that it hurts nobody."""

import json
import os
import stat
from functools import partial
from pathlib import Path

import pytest
from waiting import until

from engines.redaction import REDACTED
from engines.redaction import redacted as redacted_in
from engines.yard.capture import Lines, RequestCapture, replayable
from tasks.evidence.prompts import load_transcripts

redacted = partial(redacted_in, strict=True)
BODY = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}


@pytest.mark.parametrize(
    "secret",
    [
        "Authorization: Bearer abcdef123",
        '"Authorization": "Basic dXNlcjpwYXNz"',
        "curl -H 'bearer 9f8e7d6c5b4a'",
        "sk-proj-abcdefghijklmnop1234",
        "sk-ant-api03-abcdefghijklmnop",
        "ghp_abcdefghijklmnopqrstuvwxyz0123",
        "hf_abcdefghijklmnopqrstuvwx",
        "AKIAIOSFODNN7EXAMPLE",
        "api_key = 'tiny-one'",
        '{"password": "hunter2!"}',
        "MY_CLIENT_SECRET=abcd",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-DEF_123",
        "postgres://joe:hunter2@db.example.com/x",
        "ask jane.doe+x@mail.example.org today",
        "d41d8cd98f00b204e9800998ecf8427e",
        "QmFzZTY0IGlzIG5vdCBlbmNyeXB0aW9uIGF0IGFsbCwgMTIz",
    ],
)
def test_secrets_are_taken_out(secret):
    """The marked part is gone, wherever in the text it stands, and what stands around it stays."""
    told = redacted(f"before {secret} after")
    assert REDACTED in told
    assert told.startswith("before ")
    assert told.endswith(" after")
    for part in ("abcdef", "hunter2", "dXNl", "9f8e", "tiny", "abcd", "jane", "joe", "d41d", "QmFz", "eyJ", "IOSF"):
        assert part not in told


@pytest.mark.parametrize(
    "text",
    [
        "def area(r):\n    return 3.14159 * r ** 2\n",
        "/home/Ann/projects/Switchyard2/engines/yard/capture/very/long/path/of/Things9",
        "basic understanding of bearer responsibilities",
        "a_function_name_that_is_longer_than_any_reasonable_one_would_be",
        "version 1.2.3, port 8080, 2026-11-22T17:36:28",
        "Größe, 東京は今日も晴れです。 👨‍👩‍👧‍👦",
    ],
)
def test_plain_text_stays(text):
    assert redacted(text) == text


def test_redaction_keeps_the_shape():
    """Keys that name a secret lose their value, at any depth; numbers, null and structure stay."""
    value = {"a": [1, None, {"api_key": "x", "token_count": 3}], "tools": [{"parameters": {"password": {"type": "s"}}}]}
    assert redacted(value) == {**value, "a": [1, None, {"api_key": REDACTED, "token_count": 3}]}


def test_a_long_text_comes_to_an_end():
    """What makes regular expressions run away, for hours: long runs that almost match."""
    for text in ("a" * 200_000, "a." * 100_000, "a@" * 100_000, "password" * 25_000, "authorization: " * 15_000):
        assert redacted(text)


def test_every_line_is_a_transcript(tmp_path):
    """What the parity check loads is what was asked, roles, parts, tools and tool calls included."""
    call = {"id": "c1", "type": "function", "function": {"name": "read", "arguments": '{"path": "a.py"}'}}
    tool = {"type": "function", "function": {"name": "read", "parameters": {"type": "object"}}}
    bodies = [
        {**BODY, "user": "ann@example.org", "prompt_cache_key": "k", "metadata": {"a": "b"}},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Read a.py \ud800"}]},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c1", "content": "x = 1"},
            ],
            "tools": [tool],
            "stream": True,
        },
    ]
    capture = RequestCapture(tmp_path / "seen.jsonl", 2**20)
    for body in bodies:
        capture.take("/v1/chat/completions", body, 100)
    capture.take("/v1/completions", {"prompt": "no chat"}, 100)
    capture.take("/v1/chat/completions", {"messages": [{"role": "system", "content": "nothing asked"}]}, 100)
    capture.take("/v1/chat/completions", {"messages": [{"role": "user", "content": 5}]}, 100)
    capture.close()
    first, second = load_transcripts(tmp_path / "seen.jsonl")
    assert first.body == {"messages": BODY["messages"]}
    assert second.body["tools"] == [tool]
    assert [message.role for message in second.messages] == ["system", "user", "assistant", "tool"]
    assert second.body["messages"][2]["tool_calls"] == [call]
    assert "ann" not in (tmp_path / "seen.jsonl").read_text()
    assert capture.status() == {"path": str(tmp_path / "seen.jsonl"), "written": 2, "lost": 0}


def test_the_file_is_its_owners_and_bounded(tmp_path):
    """The latest lines are kept; both files together stay under the bound."""
    path = tmp_path / "seen.jsonl"
    path.write_text("")
    path.chmod(0o644)
    lines = Lines(path, 10_000)
    for number in range(200):
        lines.put({"number": number, "text": "word " * 40}, 250)
    lines.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    files = [path.with_name("seen.jsonl.1"), path]
    assert sum(file.stat().st_size for file in files) <= 10_000
    kept = [json.loads(line)["number"] for file in files for line in file.read_text().splitlines()]
    assert kept == list(range(kept[0], 200))
    assert len(kept) > 20


def test_a_full_disk_is_told_once_and_costs_lines_only(tmp_path):
    """/dev/full is a disk without room."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    told = []
    lines = Lines(Path("/dev/full"), 10_000, told.append)
    for number in range(50):
        lines.put({"number": number}, 20)
    lines.close()
    assert (lines.written, lines.lost) == (0, 50)
    assert len(told) == 1
    assert "No space left" in told[0]


def test_no_link_is_followed(tmp_path):
    target = tmp_path / "target"
    target.write_text("untouched")
    (tmp_path / "seen.jsonl").symlink_to(target)
    lines = Lines(tmp_path / "seen.jsonl", 10_000)
    lines.put({"a": 1}, 10)
    lines.close()
    assert target.read_text() == "untouched"


def test_what_is_too_large_is_lost_not_queued(tmp_path):
    lines = Lines(tmp_path / "seen.jsonl", 100 * 2**20)
    lines.put({}, 3 * 2**20)
    assert lines.lost == 1
    lines.close()


def test_replayable_is_what_load_transcripts_takes(tmp_path):
    """A line that it would refuse spoils the file, so each such body must be left out."""
    bodies = [
        BODY,
        {"messages": []},
        {"messages": "Hi"},
        {"messages": [{"role": "", "content": "x"}]},
        {"messages": [{"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "user", "content": ["x"]}]},
        {"messages": [{"role": "user", "content": None}], "tools": []},
        {"messages": [{"role": "user", "content": "x"}], "tools": "none"},
        {"messages": [{"role": "user", "content": "x"}], "tools": [1]},
    ]
    for body in bodies:
        path = tmp_path / "one.jsonl"
        path.write_text(json.dumps(body) + "\n")
        try:
            load_transcripts(path)
            loads = True
        except Exception:
            loads = False
        assert replayable(body) == loads, body


def test_the_yard_keeps_answered_chats(start_yard):
    """Only requests that got an answer, streamed or not; the file lies in the yard's folder."""
    yard = start_yard(settings={"capture": "seen.jsonl"}).ready()
    with yard.http() as http:
        for stream in (False, True):
            text = f"my key is sk-abcdefghijklmnop1234, stream {stream}"
            body = {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": 2, "stream": stream}
            assert http.post("/v1/chat/completions", json=body).status_code == 200
        http.post("/v1/chat/completions", content=b"not json")
    until(lambda: yard.orders.status()["capture"]["written"] == 2, "both requests to be kept")
    path = yard.home / "yard" / "seen.jsonl"
    assert [prompt.text for prompt in load_transcripts(path)] == [
        f"my key is {REDACTED}, stream {stream}" for stream in (False, True)
    ]
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_nothing_is_kept_unless_asked_for(start_yard):
    yard = start_yard().ready()
    with yard.http() as http:
        assert http.post("/v1/chat/completions", json={**BODY, "max_tokens": 2}).status_code == 200
    assert yard.orders.status()["capture"] is None
