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

# splitting rules that read digits one by one (llama.cpp's llama-vocab.cpp); transformers knows none of them
DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"})
# run there: the folder and the name of the GGUF, where to, the file of the chat template, and whether such a rule holds
SCRIPT = """
import sys
from pathlib import Path
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, name, target, template, digits = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
if digits == "True":
    one_by_one = pre_tokenizers.Digits(individual_digits=True)
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([one_by_one, rest])
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
    digits = header.tokenizer_model == "gpt2" and header.tokenizer_pre in DIGITS
    given = (gguf.absolute().parent, gguf.name, partial, template, digits)
    child = process.start(
        f"convert {gguf.name}",
        [found.program[0], "-c", SCRIPT, *map(str, given)],
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
