"""The end of each path's stream: never in a text, always found, wherever a chunk ends."""

import json

import pytest

from engines.openai.paths import ENDS

LAST = {
    "[DONE]": b"data: [DONE]\n\n",
    "message_stop": b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    "response.completed": b'data: {"type":"response.completed","response":{}}\n\n',
    "stop": b'data: {"content":"","stop": true}\n\n',
}
TEXTS = (
    "[DONE]",
    "data: [DONE]",
    "\ndata: [DONE]\n",
    '"message_stop"',
    '"response.completed"',
    '"stop":true',
    '"stop": true',
)


@pytest.mark.parametrize("path", ENDS)
def test_a_text_that_looks_like_the_end_is_none(path):
    for text in TEXTS:
        event = b"data: " + json.dumps({"choices": [{"delta": {"content": text}}], "stop": False}).encode() + b"\n\n"
        assert ENDS[path].search(event) is None


@pytest.mark.parametrize("path", ENDS)
def test_each_path_has_an_end(path):
    assert [name for name, last in LAST.items() if ENDS[path].search(b'data: {"content":"x"}\n\n' + last)]
