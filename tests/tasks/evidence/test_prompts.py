"""The shipped prompts are diverse from the first ones on, and the user's transcripts are read or refused by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engines.errors import BadInput
from tasks.evidence.prompts import load_prompts, load_transcripts


def test_shipped_prompts_are_many_with_unique_ids() -> None:
    """At least 60, each told apart by its id."""
    prompts = load_prompts()
    assert len(prompts) >= 60
    assert len({prompt.id for prompt in prompts}) == len(prompts)


def test_a_prefix_is_diverse() -> None:
    """The first 24 hold every group, so that a short run sees them all."""
    assert {prompt.group for prompt in load_prompts(24)} == {prompt.group for prompt in load_prompts()}


def test_the_capital_of_france_comes_first() -> None:
    """It is the shortest prompt known to be read differently by two engines."""
    assert load_prompts(1)[0].text == "The capital of France is"


def test_shipped_prompts_cover_scripts_turns_and_tools() -> None:
    """Sixteen languages, conversations of three turns and more, and tool schemas without oneOf."""
    prompts = load_prompts()
    assert sum(prompt.group == "language" for prompt in prompts) >= 16
    assert sum(len(prompt.messages) >= 3 for prompt in prompts) >= 5
    schemas = [prompt.tools for prompt in prompts if prompt.tools]
    assert len(schemas) >= 5
    assert "oneOf" not in json.dumps(schemas)


def test_every_shipped_prompt_ends_in_a_user_turn() -> None:
    """Otherwise an engine would continue, not answer."""
    assert {prompt.messages[-1].role for prompt in load_prompts()} == {"user"}


def test_a_limit_of_zero_is_refused() -> None:
    """Nothing compared is not parity."""
    with pytest.raises(BadInput, match="nothing to compare"):
        load_prompts(0)


def test_transcripts_lose_their_last_answer_and_keep_the_rest(tmp_path: Path) -> None:
    """An OpenAI request body reads as well; tool turns are sent on as they are."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function"}]}
    result = {"role": "tool", "tool_call_id": "a", "content": "12"}
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"model": "m", "temperature": 0, "messages": [{"role": "user", "content": "c"}, call, result]},
    ]
    path = tmp_path / "t.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    first, second = load_transcripts(path)
    assert first.body == {"messages": [{"role": "user", "content": "a"}]}
    assert second.id == "line-3"
    assert second.body["messages"][1:] == [call, result]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "not JSON"),
        ("[]", 'no list "messages"'),
        ('{"messages": []}', "nothing to answer"),
        ('{"messages": ["x"]}', "nothing to answer"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "nothing to answer"),
        ('{"messages": [{"role": "user", "content": 5}]}', "messages.0.content"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": "f"}', "tools"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": [{"function": {}}]}', "tool 1 has no name"),
        (
            '{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function", "name": "f"}]}',
            "no name: {",
        ),
        ('{"messages": ' + "[" * 5000, "nested too deeply"),
    ],
)
def test_a_bad_line_is_refused_with_its_place(tmp_path: Path, line: str, complaint: str) -> None:
    """The message names file, line and what is wrong, and shows the form wanted."""
    path = tmp_path / "t.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "fine"}]}\n' + line, encoding="utf-8")
    with pytest.raises(BadInput) as caught:
        load_transcripts(path)
    assert f"{path}:2" in str(caught.value)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_or_missing_file_is_refused(tmp_path: Path) -> None:
    """Both say which file."""
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    for name in ("empty.jsonl", "missing.jsonl"):
        with pytest.raises(BadInput, match=name):
            load_transcripts(tmp_path / name)
