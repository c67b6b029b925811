"""Memory estimates against worked examples, and the refusal to guess."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from gguf_files import LLAMA, nemotron_keys, write_gguf

from engines.errors import BadInput
from engines.fit import Largest, estimate, largest_contexts
from engines.model.free_memory import FreeMemory, _cgroup_free, free_memory
from engines.model.header import Header, read_header
from engines.model.memory import (
    GIB,
    MIB,
    Cells,
    compute_bytes,
    kv_bytes,
    kv_bytes_per_token,
    recurrent_layers,
    state_bytes_per_sequence,
    weights_bytes,
)
from engines.settings import EngineArgs, Settings

PLENTY = FreeMemory(ram_bytes=512 * GIB)


@pytest.fixture
def nemotron(tmp_path: Path) -> Header:
    return read_header(write_gguf(tmp_path / "nemotron.gguf", "nemotron_h_moe", keys=nemotron_keys()))


TWO = {"token_embd.weight": "F32", "blk.0.attn_q.weight": "Q8_0"}


def model(tmp_path: Path, architecture: str = "llama", **keys: Any) -> Header:
    """A two-layer model with `keys` (dots written as __) over the defaults."""
    merged = {**LLAMA, **{key.replace("__", "."): value for key, value in keys.items()}}
    return read_header(write_gguf(tmp_path / f"{architecture}.gguf", architecture, keys=merged))


def test_nemotron_takes_6144_bytes_per_token(nemotron: Header) -> None:
    """6 attention layers x 2 KV heads x (128 + 128) x 2 bytes, and 3.0 GiB at 512K."""
    assert kv_bytes_per_token(nemotron) == 6144
    for context, gib in {128: 0.75, 256: 1.5, 512: 3.0, 1024: 6.0}.items():
        assert kv_bytes(nemotron, context << 10) == gib * GIB


def test_nemotron_state_is_47_6_mib_per_sequence(nemotron: Header) -> None:
    """23 Mamba-2 layers of 2.07 MiB; the mixture-of-experts layers have no KV head either, but no state."""
    assert sum(recurrent_layers(nemotron)) == 23
    assert state_bytes_per_sequence(nemotron) == 23 * 4 * (3 * (4096 + 2 * 8 * 128) + 128 * 4096)
    assert state_bytes_per_sequence(nemotron) / MIB == pytest.approx(47.6, abs=0.05)


def test_mask_at_512k_is_an_eighth_to_a_quarter_gib(nemotron: Header) -> None:
    """At ubatch 128; two to four GiB at 2048."""
    for ubatch, low, high in [(128, 0.125, 0.25), (2048, 2.0, 4.0)]:
        bare = compute_bytes(nemotron, Cells(0, 0), 1, ubatch)
        full = compute_bytes(nemotron, Cells(512 << 10, 0), 1, ubatch)
        grown = [after - before for after, before in zip(full, bare, strict=True)]
        assert any(size >= low * GIB for size in grown)
        assert max(grown) <= high * GIB


@pytest.mark.parametrize(("kv_type", "expected"), [("f16", 256), ("f32", 512), ("q8_0", 136), ("q4_0", 72)])
def test_kv_types_scale_the_cache(tmp_path: Path, kv_type: str, expected: int) -> None:
    """2 layers x 2 heads x (16 + 16) elements = 128."""
    assert kv_bytes_per_token(model(tmp_path), kv_type) == expected


def test_an_unknown_kv_type_is_bad_input(tmp_path: Path) -> None:
    """The message lists those that are known."""
    with pytest.raises(BadInput, match="q8_0"):
        kv_bytes_per_token(model(tmp_path), "q3_k")


def test_sliding_layers_are_bounded_as_llama_cpp_logs_it(tmp_path: Path) -> None:
    """Gemma 3 270M, 8192 tokens: 24 + 15 MiB with one slot, 24 + 22.5 MiB with `-np 2 -ub 256` (build b10434)."""
    gemma = model(
        tmp_path,
        "gemma3",
        block_count=18,
        attention__head_count_kv=1,
        attention__key_length=256,
        attention__value_length=256,
        attention__sliding_window=512,
    )
    assert kv_bytes_per_token(gemma) == 18432
    assert kv_bytes(gemma, 8192, 1, 512) == 39 * MIB
    assert kv_bytes(gemma, 8192, 2, 256, unified=False) == 46.5 * MIB
    assert kv_bytes(gemma, 512) == 512 * 18432


def test_mla_keeps_one_latent_per_layer(tmp_path: Path) -> None:
    """kv_lora_rank + rope dimension elements, whatever the heads."""
    keys = {"attention__kv_lora_rank": 512, "rope__dimension_count": 64}
    mla = {"attention__key_length_mla": 192, "attention__value_length_mla": 128}
    assert kv_bytes_per_token(model(tmp_path, "deepseek2", **keys, **mla)) == 2 * 2 * (512 + 64)
    # an older conversion without the MLA lengths is cached head by head
    assert kv_bytes_per_token(model(tmp_path, "deepseek2", **keys)) == 256


def test_interval_models_keep_kv_in_every_fourth_layer(tmp_path: Path) -> None:
    """qwen35 writes one head_count_kv for all layers although three of four are recurrent."""
    keys = {"block_count": 8, "ssm__conv_kernel": 4, "ssm__inner_size": 64, "ssm__state_size": 16}
    qwen = model(tmp_path, "qwen35", **keys)
    assert kv_bytes_per_token(qwen) == 2 * 128
    assert state_bytes_per_sequence(qwen) == 6 * 4 * (3 * 64 + 16 * 64)


def test_shared_kv_layers_are_not_counted(tmp_path: Path) -> None:
    """The last layers of gemma4 reuse earlier ones' cache."""
    keys = {"block_count": 4, "attention__shared_kv_layers": 3}
    assert kv_bytes_per_token(model(tmp_path, "gemma4", **keys)) == 128


def test_weights_move_to_the_gpu_from_the_last_layer(tmp_path: Path) -> None:
    """token_embd stays behind, and counts again once the tied output moves."""
    header = read_header(write_gguf(tmp_path / "m.gguf", tensors=TWO))
    embedding, layer = (tensor.n_bytes for tensor in header.tensors)
    assert weights_bytes(header, 0) == {"ram": embedding + layer, "vram": 0}
    assert weights_bytes(header, 2) == {"ram": embedding + layer, "vram": 0}
    assert weights_bytes(header, 3) == {"ram": embedding, "vram": layer + embedding}


@pytest.mark.parametrize("engine", ["llama.cpp", "mistral.rs"])
def test_an_unknown_architecture_never_fits(tmp_path: Path, engine: str) -> None:
    """However much memory there is."""
    fit = estimate(model(tmp_path, "quetzal"), Settings(), engine, 4096, memory=PLENTY)
    assert (fit.verdict, fit.needs) == ("unknown", ())
    assert "quetzal" in fit.why


def test_recurrent_sizes_that_are_missing_make_it_unknown(tmp_path: Path) -> None:
    """A state of zero bytes would be a guess."""
    assert estimate(model(tmp_path, "mamba2"), Settings(), "llama.cpp", 4096, memory=PLENTY).verdict == "unknown"


def test_the_verdict_goes_from_fits_over_tight_to_does_not_fit(nemotron: Header) -> None:
    """Tight is between the expected figure and the upper one, with llama.cpp's 8 GiB host cache in it."""
    need = estimate(nemotron, Settings(), "llama.cpp", 512 << 10, memory=PLENTY).needs[0]
    assert need.low < need.expected < need.high
    assert need.high - need.expected > 8 * GIB
    for free, verdict in [(need.high, "fits"), (need.expected, "tight"), (need.expected - 1, "does not fit")]:
        fit = estimate(nemotron, Settings(), "llama.cpp", 512 << 10, memory=FreeMemory(free))
        assert fit.verdict == verdict
        assert "GiB free" in fit.why


def test_private_and_mapped_memory_are_both_shown(tmp_path: Path) -> None:
    """llama.cpp maps the weights, mistral.rs copies them."""
    header = model(tmp_path)
    for engine, mapped in (("llama.cpp", header.tensor_bytes), ("mistral.rs", 0)):
        fit = estimate(header, Settings(), engine, 4096, memory=PLENTY)
        assert fit.needs[0].mapped == mapped
        assert ("of it mapped" in fit.why) == bool(mapped)


def test_memory_that_cannot_be_read_is_unknown(nemotron: Header) -> None:
    """No number, no verdict."""
    assert estimate(nemotron, Settings(), "llama.cpp", 4096, memory=FreeMemory(None)).verdict == "unknown"


def test_gpu_layers_without_a_visible_gpu_are_unknown(nemotron: Header) -> None:
    """The plan names a GPU that this machine does not show."""
    fit = estimate(nemotron, Settings(gpu_layers=99), "llama.cpp", 4096, memory=PLENTY)
    assert fit.verdict == "unknown"
    assert "gpu_layers is 99" in fit.why


def test_host_cache_as_set_replaces_the_default(nemotron: Header) -> None:
    """host_cache_mib=0 takes the 8 GiB off."""
    default = estimate(nemotron, Settings(), "llama.cpp", 4096, memory=PLENTY).needs[0]
    without = estimate(nemotron, Settings(host_cache_mib=0), "llama.cpp", 4096, memory=PLENTY).needs[0]
    assert default.high - without.high == 8 * GIB
    assert default.expected == without.expected


def test_mistral_rs_takes_the_free_vram_unless_told(nemotron: Header) -> None:
    """90% of it goes to the KV pool when no context is set."""
    gpu = FreeMemory(ram_bytes=64 * GIB, vram_bytes=24 * GIB, n_gpus=1)

    def kv_part(settings: Settings) -> int:
        parts = estimate(nemotron, settings, "mistral.rs", 65536, memory=gpu).parts
        return next(part.high for part in parts if part.name == "KV cache")

    assert kv_part(Settings()) == int(24 * GIB * 9 / 10)
    assert kv_part(Settings(context_tokens=65536)) == 65536 * 6144


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("--pa-memory-mb 4096", 4 * GIB),
        ("--pa-memory-fraction 0.5", 12 * GIB),
        ("--pa-cache-type f8e4m3", 65536 * 3072),
    ],
)
def test_flags_size_the_pool_of_mistral_rs(nemotron: Header, args: str, expected: int) -> None:
    """As they stand in the plan."""
    gpu, own = FreeMemory(64 * GIB, vram_bytes=24 * GIB, n_gpus=1), EngineArgs(args=tuple(args.split()))
    fit = estimate(nemotron, Settings(context_tokens=65536), "mistral.rs", memory=gpu, own=own)
    assert next(part.expected for part in fit.parts if part.name == "KV cache") == expected


def test_a_measured_ratio_moves_the_expected_figure(nemotron: Header) -> None:
    """And the range still holds it."""
    plain = estimate(nemotron, Settings(), "llama.cpp", 4096, memory=PLENTY).needs[0]
    measured = estimate(nemotron, Settings(), "llama.cpp", 4096, memory=PLENTY, correction=1.5).needs[0]
    assert measured.expected == pytest.approx(plain.expected * 1.5, abs=1)
    assert measured.low <= measured.expected <= measured.high


@pytest.mark.parametrize("correction", [0.0, -1.0, float("nan"), float("inf")])
def test_a_ratio_that_is_none_is_bad_input(nemotron: Header, correction: float) -> None:
    """Zero would make every model fit."""
    with pytest.raises(BadInput, match="correction"):
        estimate(nemotron, Settings(), "llama.cpp", 4096, memory=PLENTY, correction=correction)


def gives(
    header: Header, found: Largest, engine: str, context: int, free: FreeMemory, own: EngineArgs, **more: Any
) -> str:
    """What the estimate says of a context, with the rest as it was found."""
    k_type = found.kv_types[0]
    asked = {"parallel": found.parallel, "kv_type": k_type, "gpu_layers": found.gpu_layers, "context_tokens": context}
    return estimate(header, Settings(**{**more, **asked}), engine, memory=free, own=own).verdict


@pytest.mark.parametrize("engine", ["llama.cpp", "mistral.rs", "ollama", "vllm"])
@pytest.mark.parametrize("seed", range(8))
def test_the_largest_context_fits_and_one_step_more_does_not(nemotron: Header, engine: str, seed: int) -> None:
    """Or it is all that the model was trained for; the same of what is tight."""
    chance = random.Random(seed)
    vram = chance.choice([None, 2 * GIB, 24 * GIB])
    free = FreeMemory(chance.randint(1, 40) * GIB, vram_bytes=vram, n_gpus=0 if vram is None else 1)
    more = {"flash_attention": chance.choice([None, True]), "host_cache_mib": chance.choice([None, 0])}
    found = largest_contexts(nemotron, Settings(**more, parallel=chance.choice([0, 1, 3])), engine, memory=free)
    assert {1, 4} <= {way.parallel for way in found}
    for way in found:
        step = 256 * (way.parallel or 4)
        for most, enough in ((way.fits_tokens, ("fits",)), (way.tight_tokens, ("fits", "tight"))):
            if most is not None:
                assert gives(nemotron, way, engine, most, free, EngineArgs(), **more) in enough
            if most != way.trained_tokens:
                assert gives(nemotron, way, engine, (most or 0) + step, free, EngineArgs(), **more) not in enough
        assert (way.fits_tokens or 0) <= (way.tight_tokens or 0) <= (way.trained_tokens or 0)


def test_a_kv_type_that_makes_no_difference_has_no_row(tmp_path: Path) -> None:
    """mistral.rs keeps f16 on a CPU; llama.cpp refuses a quantised V cache without flash attention; flags fix it."""
    header = model(tmp_path)

    def types(engine: str, args: str = "", **settings: Any) -> list[tuple[str, str]]:
        own = EngineArgs(args=tuple(args.split()))
        return [way.kv_types for way in largest_contexts(header, Settings(**settings), engine, own=own, memory=PLENTY)]

    assert types("llama.cpp") == [("f16", "f16"), ("q8_0", "q8_0")] * 2
    assert types("llama.cpp", kv_type="q4_0") == [("f16", "f16"), ("q4_0", "q4_0"), ("q8_0", "q8_0")] * 2
    assert types("llama.cpp", flash_attention=False) == [("f16", "f16")] * 2
    assert types("llama.cpp", "-ctk q8_0") == [("q8_0", "f16")] * 2
    assert types("mistral.rs", kv_type="q8_0") == [("f16", "f16")] * 2


def test_layers_on_the_gpu_are_as_many_as_hold_the_context(nemotron: Header) -> None:
    """Beside all of them, where all do not; with a GPU that holds the whole there is nothing to look for."""

    def layers(vram: int) -> list[int | None]:
        free = FreeMemory(64 * GIB, vram_bytes=vram, n_gpus=1)
        asked = Settings(context_tokens=512 << 10, ubatch_tokens=128)
        return [way.gpu_layers for way in largest_contexts(nemotron, asked, "llama.cpp", memory=free)[:2]]

    assert layers(24 * GIB) == [None, None]
    whole, some = layers(4 * GIB)
    assert whole is None
    assert some is not None
    assert 0 < some < 53


def test_what_cannot_be_sized_has_no_largest_context(tmp_path: Path) -> None:
    """Nor has an engine that others run."""
    for engine in ("llama.cpp", "openai"):
        assert largest_contexts(model(tmp_path, "quetzal"), Settings(), engine, memory=PLENTY) == []


def test_this_machine_has_some_memory_free() -> None:
    """The figure is read, whatever it is."""
    free = free_memory()
    assert free.ram_bytes is not None
    assert free.ram_bytes > 0


def test_the_tightest_cgroup_limit_counts(tmp_path: Path) -> None:
    """A parent's limit binds the child; page cache that can be dropped counts as free."""
    own, root = tmp_path / "own", tmp_path / "root"
    leaf = root / "outer" / "inner"
    leaf.mkdir(parents=True)
    own.write_text("0::/outer/inner\n")
    for folder, limit in [(leaf, "max"), (root / "outer", "1000")]:
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text("700")
        (folder / "memory.stat").write_text("anon 500\ninactive_file 200\n")
    assert _cgroup_free(root, own) == 500
    assert _cgroup_free(root, tmp_path / "absent") is None
