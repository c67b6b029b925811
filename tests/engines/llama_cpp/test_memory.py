"""Memory of llama-server: figures out of real logs, and what flags of the user's own change."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from gguf_files import LLAMA, write_gguf

from engines.fit import estimate
from engines.model.free_memory import FreeMemory
from engines.model.header import Header, read_header
from engines.model.memory import GIB, MIB, Part
from engines.settings import EngineArgs, Settings

RAM = FreeMemory(ram_bytes=512 * GIB)
GPU = FreeMemory(ram_bytes=512 * GIB, vram_bytes=80 * GIB, n_gpus=1)
SMOLLM2 = {
    "block_count": 30,
    "context_length": 8192,
    "embedding_length": 576,
    "feed_forward_length": 1536,
    "attention.head_count": 9,
    "attention.head_count_kv": 3,
}
GEMMA3 = {
    "block_count": 18,
    "context_length": 32768,
    "embedding_length": 640,
    "feed_forward_length": 2048,
    "attention.head_count": 4,
    "attention.head_count_kv": 1,
    "attention.key_length": 256,
    "attention.value_length": 256,
    "attention.sliding_window": 512,
}
QWEN36 = {
    "block_count": 65,
    "nextn_predict_layers": 1,
    "context_length": 262144,
    "embedding_length": 5120,
    "feed_forward_length": 17408,
    "attention.head_count": 24,
    "attention.head_count_kv": 4,
    "attention.key_length": 256,
    "attention.value_length": 256,
    "full_attention_interval": 4,
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 6144,
    "ssm.state_size": 128,
    "ssm.group_count": 16,
}
QWEN35_9B = QWEN36 | {
    "block_count": 32,
    "nextn_predict_layers": 0,
    "ssm.inner_size": 4096,
}
DEEPSEEK_R1 = {
    "block_count": 61,
    "context_length": 163840,
    "embedding_length": 7168,
    "feed_forward_length": 18432,
    "attention.head_count": 128,
    "attention.head_count_kv": 1,
    "attention.kv_lora_rank": 512,
    "attention.key_length": 576,
    "attention.value_length": 512,
    "attention.key_length_mla": 192,
    "attention.value_length_mla": 128,
    "rope.dimension_count": 64,
}
EXPERTS = {f"blk.{layer}.ffn_{kind}_exps.weight": "Q8_0" for layer in range(2) for kind in ("up", "down", "gate")}
TENSORS = {"token_embd.weight": "F32", "blk.0.attn_q.weight": "Q8_0", "blk.1.attn_q.weight": "Q8_0"} | EXPERTS


@pytest.fixture
def header(tmp_path: Path) -> Any:
    def made(architecture: str, keys: dict[str, Any], **more: Any) -> Header:
        return read_header(write_gguf(tmp_path / "m.gguf", architecture, keys=keys, **more))

    return made


def parts(
    header: Header, args: str = "", memory: FreeMemory = RAM, env: dict[str, str] | None = None, **settings: Any
) -> dict[tuple[str, str], Part]:
    """The estimate's parts by name and device."""
    own = EngineArgs(args=tuple(args.split()), env=env or {})
    fit = estimate(header, Settings(**settings), "llama.cpp", memory=memory, own=own)
    assert fit.needs, fit.why
    return {(part.name, part.device): part for part in fit.parts}


def brackets(part: Part, mib: float) -> bool:
    """Whether a figure that llama-server printed (MiB, two decimals) lies in the estimate."""
    return part.low <= (mib + 0.01) * MIB and (mib - 0.01) * MIB <= part.high


@pytest.mark.parametrize(
    ("flash_attention", "context", "ubatch", "printed"),
    [
        (False, 65536, 512, 1286.38),
        (False, 65536, 128, 321.6),
        (False, 8192, 512, 166.38),
        (True, 65536, 512, 77.51),
        (None, 65536, 512, 77.51),
        (True, 1000, 512, 14.51),
    ],
)
def test_compute_buffer_of_smollm2(
    header: Any, flash_attention: bool | None, context: int, ubatch: int, printed: float
) -> None:
    """Without flash attention it grows with context x ubatch x heads (b10434)."""
    settings = {"flash_attention": flash_attention, "context_tokens": context, "ubatch_tokens": ubatch}
    found = parts(header("llama", SMOLLM2, tokens=["x"] * 49152), **settings)["compute buffers", "ram"]
    assert brackets(found, printed)
    assert abs(found.expected - printed * MIB) < 0.1 * printed * MIB + 8 * MIB


def test_scores_are_copied_as_f16_without_flash_attention(header: Any) -> None:
    """SmolLM2, 1,024 tokens: 9 MiB beside the buffers that it prints; none on a GPU."""
    model, name = header("llama", SMOLLM2), ("attention scores as f16", "ram")
    settings = {"context_tokens": 1024, "flash_attention": False}
    assert parts(model, **settings)[name].expected == 9 * MIB
    assert name not in parts(model, context_tokens=1024)
    assert name not in parts(model, "", GPU, **settings)


def test_the_wheel_has_a_python_process_around_it(header: Any) -> None:
    """15 MiB more than the binary."""
    model = header("llama", SMOLLM2)
    binary, hosted = (
        estimate(model, Settings(), "llama.cpp", memory=RAM, hosted=hosted).needs[0].expected
        for hosted in (False, True)
    )
    assert hosted - binary == 15 * MIB


@pytest.mark.parametrize(
    ("settings", "args", "printed"),
    [
        ({"context_tokens": 8192}, "", 39),
        ({"context_tokens": 1000}, "", 18),
        ({"context_tokens": 1024, "ubatch_tokens": 128}, "", 14.25),
        ({"context_tokens": 8192, "parallel": 4}, "", 84),
        ({"context_tokens": 8192, "parallel": 4}, "-kvu", 61.5),
        ({"context_tokens": 8192, "parallel": 0}, "", 61.5),
        ({"context_tokens": 8192, "parallel": 0}, "--no-kv-unified", 61.5),
        ({"context_tokens": 8192, "parallel": 3}, "", 69.75),
        ({"context_tokens": 8192}, "--swa-full", 144),
        ({"context_tokens": 8192}, "-ctk q8_0 -ctv q4_0", 15.84),
        ({"context_tokens": 8192}, "--cache-type-v q8_0", 29.86),
        ({"context_tokens": 8192}, "-ctk iq4_nl -ctv iq4_nl", 10.97),
        ({"context_tokens": 32768, "parallel": 2}, "", 126),
        ({"context_tokens": 8192, "batch_tokens": 128}, "", 35.25),
    ],
)
def test_kv_cache_of_gemma_3(header: Any, settings: dict[str, Any], args: str, printed: float) -> None:
    """K and V apart; sliding layers by slot, by unified cache, or in full (b10434)."""
    found = parts(header("gemma3", GEMMA3), args, **settings)["KV cache", "ram"]
    assert found.expected == pytest.approx(printed * MIB, abs=0.01 * MIB)
    assert brackets(found, printed)


def test_kv_types_come_from_variables_too_and_a_flag_wins(header: Any) -> None:
    """LLAMA_ARG_CACHE_TYPE_K is -ctk."""
    env = {"LLAMA_ARG_CACHE_TYPE_K": "q8_0", "LLAMA_ARG_CACHE_TYPE_V": "q8_0"}
    settings = {"context_tokens": 8192}
    gemma = header("gemma3", GEMMA3)
    both = parts(gemma, "-ctk q8_0 -ctv q4_0", **settings)["KV cache", "ram"].expected
    assert parts(gemma, "-ctv q4_0", env=env, **settings)["KV cache", "ram"].expected == both


def test_context_checkpoints_of_a_sliding_window_model(header: Any) -> None:
    """Gemma 3 270M: 32 of 7.5 MiB for each slot; none with --swa-full or --ctx-checkpoints 0."""
    gemma, name = header("gemma3", GEMMA3), ("context checkpoints", "ram")
    assert parts(gemma)[name].high == 32 * 7.5 * MIB
    assert parts(gemma, parallel=0)[name].high == 4 * 32 * 7.5 * MIB
    assert parts(gemma, "--swa-checkpoints 8")[name].high == 8 * 7.5 * MIB
    assert parts(gemma, context_tokens=256)[name].high == 32 * 3.75 * MIB
    assert parts(gemma, context_tokens=2048)[name].expected == 2 * 7.5 * MIB  # as it logs them for 2,001 tokens
    assert parts(gemma, "-ctxcp 1", context_tokens=2048, parallel=2)[name].expected == 2 * 7.5 * MIB
    for args in ("--swa-full", "-ctxcp 0"):
        assert name not in parts(gemma, args)
    assert name not in parts(header("llama", SMOLLM2))


@pytest.mark.parametrize(
    ("keys", "parallel", "printed"),
    [(QWEN36, 3, 448.88), (QWEN35_9B, 1, 50.25)],
)
def test_an_mtp_layer_keeps_no_recurrent_state(
    header: Any, keys: dict[str, Any], parallel: int, printed: float
) -> None:
    """Qwen3.6 27B: 65 blocks, the last one for MTP, 48 recurrent. Qwen3.5 9B: 24 of 32."""
    found = parts(header("qwen35", keys), parallel=parallel)["recurrent state", "ram"]
    assert found.expected == pytest.approx(printed * MIB, abs=0.01 * MIB)
    assert brackets(found, printed)


def test_an_mtp_layer_keeps_kv_only_where_it_drafts(header: Any) -> None:
    """16 of 64 layers have attention; MTP adds a context of its own, and states to roll back to."""
    qwen, settings = header("qwen35", QWEN36), {"context_tokens": 8192}
    plain, drafting = parts(qwen, **settings), parts(qwen, "--spec-type draft-mtp --spec-draft-n-max 2", **settings)
    one_layer = 8192 * 4 * (256 + 256) * 2
    assert plain["KV cache", "ram"].expected == drafting["KV cache", "ram"].expected == 16 * one_layer
    assert ("KV cache of drafting", "ram") not in plain
    assert drafting["KV cache of drafting", "ram"].low == one_layer
    assert drafting["recurrent state", "ram"].expected == 3 * plain["recurrent state", "ram"].expected


def test_kv_heads_of_the_main_layers_alone_are_enough(header: Any) -> None:
    """Some files list them without the MTP layer."""
    assert header("glm4moe", LLAMA | {"block_count": 3, "nextn_predict_layers": 1, "attention.head_count_kv": [2, 2]})


def test_latent_kv_of_deepseek_r1(header: Any) -> None:
    """MLA keeps one tensor, of K's type."""
    deepseek = header("deepseek2", DEEPSEEK_R1)
    whole = parts(deepseek, context_tokens=32768, kv_type="q8_0")["KV cache", "ram"]
    assert whole.expected == pytest.approx(1166.62 * MIB, abs=0.01 * MIB)
    assert parts(deepseek, "-ctk q8_0", context_tokens=32768)["KV cache", "ram"] == whole


@pytest.mark.parametrize(
    ("args", "on_cpu"),
    [
        ("", 0),
        ("-cmoe", 6),
        ("--cpu-moe", 6),
        ("-ncmoe 1", 3),
        ("--n-cpu-moe 99", 6),
        ("-ot exps=CPU", 6),
        (r"-ot blk\.1\.ffn_.*_exps\.=CPU", 3),
        (r"-ot blk\.0\.ffn_up_exps=CUDA0,exps=CPU", 5),
        (r"-ot blk\.0\.=CUDA0 -ot exps=CPU", 3),
        ("-ot exps=CUDA_Host", 6),
        ("-ot exps=CUDA0", 0),
        ("-ot exps", 0),
        ("-ot (=CPU", 0),
        ("-ncmoe -1", 0),
        ("-ncmoe ²", 0),
    ],
)
def test_experts_kept_on_the_cpu(header: Any, args: str, on_cpu: int) -> None:
    """By name as llama-server places tensors: the first pattern that is found in it."""
    moe = header("qwen3moe", LLAMA, tensors=TENSORS)
    found, plain = parts(moe, args, GPU), parts(moe, "", GPU)
    expert = next(t.n_bytes for t in moe.tensors if "exps" in t.name)
    assert found["weights", "ram"].expected - plain["weights", "ram"].expected == on_cpu * expert
    assert plain["weights", "vram"].expected - found["weights", "vram"].expected == on_cpu * expert


def test_experts_by_a_variable(header: Any) -> None:
    """LLAMA_ARG_N_CPU_MOE is -ncmoe."""
    moe = header("qwen3moe", LLAMA, tensors=TENSORS)
    assert parts(moe, "", GPU, env={"LLAMA_ARG_N_CPU_MOE": "1"}) == parts(moe, "-ncmoe 1", GPU)


@pytest.mark.parametrize(
    ("args", "kind"),
    [
        ("", "mapped"),
        ("--no-mmap", "private"),
        ("--load-mode none", "private"),
        ("-lm dio", "private"),
        ("-lm mlock", "private"),
        ("-lm mmap+mlock", "mapped"),
        ("-dio", "private"),
        ("--no-mmap --mmap", "mapped"),
    ],
)
def test_weights_are_mapped_or_copied(header: Any, args: str, kind: str) -> None:
    """Once in either case."""
    model = header("llama", LLAMA, tensors=TENSORS)
    found = parts(model, args)["weights", "ram"]
    assert (found.kind, found.expected) == (kind, model.tensor_bytes)


def test_weights_in_the_cpus_own_layout_are_a_copy(header: Any) -> None:
    """Gemma 3 270M Q4_K_M: 12.66 MiB of Q4_K in CPU_REPACK (b10434, AVX2); the sum counts them once."""
    model = header("llama", LLAMA, tensors={**TENSORS, "blk.0.ffn_up.weight": "Q4_K"})
    copied = next(tensor.n_bytes for tensor in model.tensors if tensor.type == "Q4_K")
    found = parts(model)
    assert found["repacked weights", "ram"].expected == copied
    assert found["weights", "ram"].expected == model.tensor_bytes - copied
    assert found["weights", "ram"].high == model.tensor_bytes
    for args in ("--no-repack", "--no-mmap"):
        assert parts(model, args)["weights", "ram"].expected == model.tensor_bytes
        assert ("repacked weights", "ram") not in parts(model, args)


def test_a_kv_cache_kept_off_the_gpu(header: Any) -> None:
    """--no-kv-offload."""
    model, settings = header("llama", SMOLLM2), {"context_tokens": 8192}
    assert parts(model, "", GPU, **settings)["KV cache", "vram"].expected == 180 * MIB
    found = parts(model, "-nkvo", GPU, **settings)
    assert found["KV cache", "ram"].expected == 180 * MIB
    assert ("KV cache", "vram") not in found


def test_files_that_flags_name_take_memory_too(tmp_path: Path, header: Any) -> None:
    """A projector and an adapter by their size, a draft model with its KV cache."""
    draft = write_gguf(tmp_path / "draft.gguf", keys=LLAMA)
    model = header("llama", SMOLLM2)
    (tmp_path / "mm.gguf").write_bytes(bytes(1000))
    found = parts(model, f"--mmproj {tmp_path / 'mm.gguf'} -md {draft}", context_tokens=4096)
    assert found["projector", "ram"].low == 1000
    assert found["draft model", "ram"].low == read_header(draft).tensor_bytes
    assert found["KV cache of drafting", "ram"].low == 4096 * 256


def test_logits_of_every_token_where_embeddings_are_asked_for(header: Any) -> None:
    """SmolLM2 with --embeddings, ubatch 512: 98.25 MiB (b10434)."""
    model = header("llama", SMOLLM2, tokens=["x"] * 49152)
    found = parts(model, "--embeddings", context_tokens=8192)["compute buffers", "ram"]
    assert brackets(found, 98.25)
    assert found.low > 90 * MIB


FLAGS = (
    "--spec-type draft-mtp", "--spec-draft-n-max -5", "-ctxcp -1", "-ctxcp 64", "-md /nowhere", "--lora ,", "--no-host",
    "-nkvo", "-kvu", "--swa-full", "-ctk q4_0", "-ctv f32", "-cmoe", "-ncmoe 1", "-ot .=CPU", "-ot .=CUDA0",
    "-dev none", "--no-mmap", "-nr", "--embeddings",
)  # fmt: skip
SETTINGS: dict[str, list[Any]] = {
    "parallel": [0, 1, 3],
    "context_tokens": [None, 1, 100_000],
    "gpu_layers": [None, 0, 1, 999],
    "ubatch_tokens": [None, 1, 4096],
    "flash_attention": [None, False],
    "host_cache_mib": [None, -1, 0],
}


@pytest.mark.parametrize("seed", range(40))
def test_parts_are_in_order_whatever_the_flags(header: Any, seed: int) -> None:
    """None is negative, none expected outside its bounds; what llama-server refuses counts as nothing."""
    chance = random.Random(seed)
    architecture, keys = chance.choice([("qwen35", QWEN36), ("gemma3", GEMMA3), ("deepseek2", DEEPSEEK_R1)])
    model = header(architecture, keys, tensors={**TENSORS, "blk.0.ffn_up.weight": "Q4_K"})
    args = " ".join(chance.sample(FLAGS, chance.randint(0, 6)))
    settings = {name: chance.choice(values) for name, values in SETTINGS.items()}
    memory = chance.choice([RAM, GPU] if not settings["gpu_layers"] else [GPU])
    found = parts(model, args, memory, **settings).values()
    assert all(0 <= part.low <= part.expected <= part.high for part in found), (args, settings, found)
    held = sum(part.expected for part in found if part.name in ("weights", "repacked weights"))
    assert model.tensor_bytes <= held <= 2 * model.tensor_bytes


def test_a_host_cache_without_bound_is_never_known_to_fit(header: Any) -> None:
    """--cache-ram -1."""
    fit = estimate(header("llama", LLAMA), Settings(host_cache_mib=-1), "llama.cpp", memory=RAM)
    assert fit.verdict == "tight"
