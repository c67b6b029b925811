"""Slots of llama-server: what a saved one depends on, and whose they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engines.driver import Installation
from engines.errors import BadInput
from engines.llama_cpp.driver import LlamaCpp
from engines.llama_cpp.slots import SAVE_PATH, LlamaSlots
from engines.openai.slots import Slot
from engines.settings import EngineArgs, Serve, Settings

FOUND = Installation("llama.cpp", "binary", ("llama-server",), "1", frozenset({SAVE_PATH}))


def asked(folder: Path, *, own: tuple[str, ...] = (), **settings: Any) -> Serve:
    model = folder / "m.gguf"
    if not model.exists():
        model.write_bytes(b"weights")
    defaults: dict[str, Any] = {"context_tokens": 4096, "threads": 1}
    return Serve(model_id="m", gguf=model, port=1, settings=Settings(**defaults | settings), own=EngineArgs(args=own))


def test_a_saved_slot_is_for_one_build_one_model_and_one_cache(tmp_path: Path) -> None:
    """llama-server takes the file of another model of the same shape, and answers with it."""
    slots, vector = LlamaSlots(), tmp_path / "vector.gguf"
    vector.write_bytes(b"one")
    keys = [
        slots.key("b1", asked(tmp_path)),
        slots.key("b2", asked(tmp_path)),
        slots.key("b1", asked(tmp_path, context_tokens=8192)),
        slots.key("b1", asked(tmp_path, parallel=2)),
        slots.key("b1", asked(tmp_path, kv_type="q8_0")),
        slots.key("b1", asked(tmp_path, own=("--rope-freq-scale", "0.5"))),
        slots.key("b1", asked(tmp_path, own=("--control-vector", str(vector)))),
    ]
    vector.write_bytes(b"two")
    keys.append(slots.key("b1", asked(tmp_path, own=("--control-vector", str(vector)))))
    (tmp_path / "m.gguf").write_bytes(b"other weights")
    keys.append(slots.key("b1", asked(tmp_path)))
    assert len(set(keys)) == len(keys)


def test_what_does_not_shape_the_cache_keeps_it(tmp_path: Path) -> None:
    """More threads, say: `switchyard reload` starts the engine again for them."""
    slots = LlamaSlots()
    assert slots.key("b1", asked(tmp_path)) == slots.key("b1", asked(tmp_path, threads=8, seed=3, batch_tokens=64))


def test_a_model_that_cannot_be_read_has_no_key(tmp_path: Path) -> None:
    serve = asked(tmp_path)
    serve.gguf.unlink()
    with pytest.raises(BadInput):
        LlamaSlots().key("b1", serve)


def test_the_folder_is_a_flag_only_where_one_is_asked_for(tmp_path: Path) -> None:
    plain = LlamaCpp().argv(FOUND, asked(tmp_path))
    saving = LlamaCpp().argv(FOUND, asked(tmp_path).model_copy(update={"slots": tmp_path}))
    assert SAVE_PATH not in plain
    assert saving == [*plain[:-1], SAVE_PATH, str(tmp_path), plain[-1]]


def test_slots_are_the_clients_where_the_plan_has_a_folder_for_them() -> None:
    """Its own slot actions pass, and ours stay off; else they are refused, with the reason."""
    ours, theirs = (LlamaCpp().paths(FOUND, EngineArgs(args=args)) for args in ((), (SAVE_PATH, "/slots")))
    assert (ours.kind("/slots/0"), ours.slots is not None) == ("changes", True)
    assert (theirs.kind("/slots/0"), theirs.change("/slots/0"), theirs.slots) == ("reads", "", None)


@pytest.mark.parametrize(
    ("flags", "args"),
    [
        (frozenset(), ()),
        (FOUND.flags, ("--embedding",)),
        (FOUND.flags, ("--lora", "a.gguf")),
        (FOUND.flags, ("--spec-draft-model", "d.gguf")),
    ],
    ids=["an old build", "no chat", "adapters", "a draft model"],
)
def test_slots_that_cannot_be_saved_are_left_alone(flags: frozenset[str], args: tuple[str, ...]) -> None:
    found = Installation("llama.cpp", "binary", ("llama-server",), "1", flags)
    assert LlamaCpp().paths(found, EngineArgs(args=args)).slots is None


def test_what_it_answers_is_read() -> None:
    """As b10434 does; an answer that is none is a ValueError."""
    slots = LlamaSlots()
    listed = b'[{"id":0,"n_ctx":4096,"is_processing":true,"n_prompt_tokens":21},{"id":1,"is_processing":false}]'
    assert slots.listed(listed) == [Slot(0, 21, True), Slot(1, 0, False)]
    assert slots.tokens(200, b'{"id_slot":0,"filename":"f","n_saved":2480,"n_written":57000000}') == 2480
    assert slots.tokens(200, b'{"id_slot":0,"filename":"f","n_restored":2480,"n_read":57000000}') == 2480
    with pytest.raises(ValueError, match="HTTP 400: Unable to restore slot"):
        slots.tokens(400, b'{"error":{"code":400,"message":"Unable to restore slot"}}')
    with pytest.raises(ValueError, match="no list of slots"):
        slots.listed(b'{"error":{}}')
