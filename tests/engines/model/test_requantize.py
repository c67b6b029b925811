"""A model in another quant: what is written, what is refused, and that both engines take it."""

from __future__ import annotations

from pathlib import Path

import gguf
import installed
import numpy as np
import pytest

from engines.errors import BadInput
from engines.model.header import read_header
from engines.model.requantize import FILE_TYPES, requantize
from engines.process.serving import free_port, serving
from engines.registry import driver
from engines.settings import Serve, Settings

KINDS = [*FILE_TYPES]


def model(path: Path, *, columns: int = 64, kind: str = "F32", parts: int = 0) -> Path:
    """A file with a few tensors of random weights, and values of every type in its header."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("general.file_type", 0)
    writer.add_array("tokenizer.ggml.tokens", ["a", "ü", ""])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_string("general.name", "x")
    if parts:
        writer.add_uint16("split.count", parts)
    dice = np.random.default_rng(3)
    for name, rows in (("token_embd.weight", 8), ("blk.0.attn_q.weight", 16), ("blk.0.ffn_gate_inp.weight", 4)):
        weights = dice.normal(size=(rows, columns)).astype(np.float32)
        made = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quantize(weights, made) if kind != "F32" else weights, raw_dtype=made)
    writer.add_tensor("blk.0.attn_norm.weight", dice.normal(size=columns).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_weights_change_and_all_else_stays(tmp_path: Path, kind: str) -> None:
    """Norms and gates keep their kind, values of the header theirs; the loss is what a reader of the file finds."""
    source = model(tmp_path / "a.gguf")
    done = requantize(source, tmp_path / "b.gguf", kind)
    before, after = gguf.GGUFReader(source), gguf.GGUFReader(done.path)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in after.tensors}
    assert kinds["blk.0.attn_q.weight"] == kind
    assert kinds["token_embd.weight"] == ("Q8_0" if kind[:2] in ("Q4", "Q5") else kind)
    assert (kinds["blk.0.attn_norm.weight"], kinds["blk.0.ffn_gate_inp.weight"]) == ("F32", "F32")
    for name, field in before.fields.items():
        expected = FILE_TYPES[kind] if name == "general.file_type" else field.contents()
        assert name.startswith("GGUF.") or after.fields[name].contents() == expected, name
    lost = weighed = 0.0
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert [*old.shape] == [*new.shape]
        if old.tensor_type == new.tensor_type:
            assert old.data.tobytes() == new.data.tobytes()
        else:
            weights = gguf.dequantize(new.data, new.tensor_type)
            lost += float(np.square(weights - old.data, dtype=np.float64).sum())
            weighed += float(np.square(old.data, dtype=np.float64).sum())
    assert done.error == pytest.approx((lost / weighed) ** 0.5)
    assert done.worst_error >= done.error > 0
    assert (done.n_tensors, done.was_quantised, done.n_bytes) == (2, False, done.path.stat().st_size)
    assert read_header(done.path).architecture == "llama"


def test_what_was_quantised_before_is_said(tmp_path: Path) -> None:
    assert requantize(model(tmp_path / "a.gguf", kind="Q4_0"), tmp_path / "b.gguf", "Q8_0").was_quantised


@pytest.mark.parametrize(
    ("options", "kind", "line"),
    [
        ({}, "Q4_K_M", "--to Q4_K_M: not a kind that can be written; there are F16, Q4_0"),
        ({"columns": 40}, "Q8_0", "--to Q8_0: rows of token_embd.weight have 40 values, no multiple of 32"),
        ({"parts": 3}, "Q8_0", "a part of a split model; merge it first with llama-gguf-split --merge"),
    ],
)
def test_what_cannot_be_written_is_one_line(tmp_path: Path, options: dict[str, int], kind: str, line: str) -> None:
    source = model(tmp_path / "a.gguf", **options)
    with pytest.raises(BadInput, match=line):
        requantize(source, tmp_path / "b.gguf", kind)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf"]


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    source, target = model(tmp_path / "a.gguf"), tmp_path / "b.gguf"
    target.write_bytes(b"x")
    with pytest.raises(BadInput, match="is there already"):
        requantize(source, target, "Q8_0")
    assert target.read_bytes() == b"x"
    requantize(source, target, "Q8_0", force=True)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00\x09\x00", b"not a model at all, but longer"])
def test_a_file_that_is_no_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(BadInput, match="cannot be read as GGUF"):
        requantize(tmp_path / "a.gguf", tmp_path / "b.gguf", "Q8_0")


def test_what_is_broken_off_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        requantize(model(tmp_path / "a.gguf"), tmp_path / "b.gguf", "Q8_0", progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf"]


def test_too_little_disk_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(BadInput, match="MiB are free there"):
        requantize(model(tmp_path / "a.gguf"), tmp_path / "b.gguf", "Q8_0")


@pytest.mark.engine
@pytest.mark.parametrize("kind", ["Q8_0", "F16", "Q4_0"])
@pytest.mark.parametrize("engine", ["llama.cpp", "mistral.rs"])
def test_both_engines_load_it(tmp_path: Path, kind: str, engine: str) -> None:
    """One real token, which `serving` waits for."""
    done = requantize(installed.smollm2(*installed.BOTH), tmp_path / "m.gguf", kind)
    one = driver(engine)
    found = one.find("binary" if engine == "llama.cpp" else "hosted")
    serve = Serve(model_id="m", gguf=done.path, port=free_port(), settings=Settings(context_tokens=512, threads=1))
    with serving(one, found, serve, state_dir=tmp_path, log_path=tmp_path / "log") as served:
        assert served.endpoint.model_id
