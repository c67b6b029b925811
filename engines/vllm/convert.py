"""A GGUF written out as a Hugging Face directory by the transformers of an environment with vLLM."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from engines import environment
from engines.driver import Installation
from engines.errors import BadInput, EngineError
from engines.model.header import read_header
from engines.process import process
from engines.units import size
from engines.vllm.driver import FLOAT_BYTES, FROM_GGUF, n_parameters

# run there: the folder and the name of the GGUF, where to, and the file of the chat template
SCRIPT = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, name, target, template = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
tokenizer.chat_template = Path(template).read_text(encoding="utf-8") or None
try:  # transformers 5 may keep the weights packed, and writes none that came out of a GGUF
    from transformers import GgufConfig
    how = {"quantization_config": GgufConfig(dequantize=True)}
except ImportError:
    how = {}
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float16, **how)
model.hf_quantizer = None
if hasattr(model.config, "quantization_config"):
    del model.config.quantization_config
model.save_pretrained(target)
tokenizer.save_pretrained(target)
"""


def convert(found: Installation, gguf: Path, target: Path, home: Path) -> None:
    """Write the weights of `gguf` as floats of 16 bits, its tokenizer and its chat template into the new `target`.

    `home` has the register and the log of the process. Raises BadInput for an architecture that transformers does not
    read, a target that exists or a full disk; EngineError with the last line that was printed. What was begun is
    removed.
    """
    header = read_header(gguf)
    if header.architecture not in FROM_GGUF:
        known = ", ".join(sorted(FROM_GGUF))
        raise BadInput(f"{gguf}: transformers reads no GGUF of architecture {header.architecture}; it reads {known}")
    if target.exists():
        raise BadInput(f"{target} is there already; name a new directory, or remove it")
    above = next(folder for folder in target.absolute().parents if folder.exists())
    needed, free = FLOAT_BYTES * n_parameters(header), shutil.disk_usage(above).free
    if needed > free:
        raise BadInput(f"{target}: needs {size(needed)} of disk, and {size(free)} are free")
    partial = target.absolute().with_name(f".{target.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    template = partial / "template.jinja"
    template.write_text(header.chat_template or "", encoding="utf-8")
    child = process.start(
        f"convert {gguf.name}",
        [found.program[0], "-c", SCRIPT, str(gguf.absolute().parent), gguf.name, str(partial), str(template)],
        state_dir=home,
        log_path=home / "logs" / "convert.log",
        env={
            **environment.of_engine(os.environ),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "TQDM_DISABLE": "1",
        },
    )
    try:
        if child.wait():
            last = (child.log_tail() or ("it printed nothing",))[-1].strip()[:300]
            raise EngineError(f"transformers of {found.where} could not convert {gguf}: {last} ({child.log.path})")
        template.unlink()
        os.replace(partial, target)
    finally:
        child.stop()
        shutil.rmtree(partial, ignore_errors=True)
