"""Plans over the engines of tests/rig/played_engine.py, whose evaluation takes seconds."""

from __future__ import annotations

import sys
from pathlib import Path

from gguf_files import LLAMA, write_gguf

TESTS = Path(__file__).parent
# what is measured, as little as can be
AMOUNTS = """\
[measure]
requests_per_block = 1
warmup_min = 0
warmup_max = 1
looks = [3]
max_discarded_blocks = 0
calibration_blocks = 0
max_tokens = 4
parity_prompts = 2
parity_tokens = 4
tool_prompts = 3
soak_s = 1
every_behaviour = false
[client]
requires = ["chat_answer"]
"""


def played(folder: Path, name: str) -> Path:
    """tests/rig/played_engine.py as an executable called `name`."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path[:0] = [{str(TESTS)!r}]\nimport played_engine\nplayed_engine.main()\n"
    )
    path.chmod(0o755)
    return path


def two_builds(folder: Path, *models: str, tail: str = "") -> Path:
    """A plan over two builds of one played engine, each with a library beside it: `one` serves, `two` is proposed."""
    path = plan_of(folder, *models, tail=tail)
    text = (
        path.read_text().replace('engine = "mistral.rs"', 'engine = "llama.cpp"').replace("mistralrs", "llama-server")
    )
    for name, version in (("one", "1 (first)"), ("two", "1 (second)")):
        build = played(folder / name, "llama-server")
        build.with_name("build").write_text(version)
        build.with_name("libllama.so").write_text(version)
        text = text.replace(f'binary = "{folder}/llama-server"', f'name = "llama.cpp@{name}"\nbinary = "{build}"', 1)
    path.write_text(text)
    return path


def plan_of(folder: Path, *models: str, head: str = "", tail: str = "") -> Path:
    """A plan over the played engines, as small as can be."""
    tables = []
    for name in models:
        gguf = write_gguf(folder / f"{name}.gguf", keys=LLAMA)
        tables.append(f'[[models]]\nid = "{name}"\ngguf = "{gguf}"\nload = "demand"\n')
    path = folder / "plan.toml"
    path.write_text(f"""
name = "played"
{head}
[incumbent]
engine = "llama.cpp"
binary = "{played(folder, "llama-server")}"
[candidate]
engine = "mistral.rs"
binary = "{played(folder, "mistralrs")}"
{"".join(tables)}
{AMOUNTS}{tail}
""")
    return path
