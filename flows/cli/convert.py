"""`switchyard convert`: a GGUF as the directory that an engine of float weights is given."""

from pathlib import Path
from typing import Annotated

import typer

from engines.home import home
from engines.registry import driver
from engines.units import size
from engines.vllm.convert import convert as written
from engines.vllm.driver import Vllm
from flows.cli.options import Json
from flows.cli.output import print_lines, print_step


def convert(
    model: Annotated[Path, typer.Argument(help="The model file (GGUF).")],
    directory: Annotated[Path, typer.Argument(help="The new directory.")],
    python: Annotated[
        Path | None, typer.Option(help="Python of the environment with vLLM, else the one found.")
    ] = None,
    json_: Json = False,
) -> None:
    """Write a GGUF as a Hugging Face directory of 16-bit floats, with transformers, for vLLM.

    Quantised weights come out as they are in the file: what they lost before stays lost.

    Example: `switchyard convert model-F16.gguf model-hf`
    """
    found = driver(Vllm.name).find(binary=python)
    print_step(f"transformers of {found.where} reads {model}")
    written(found, model, directory, home())
    n_bytes = sum(file.stat().st_size for file in directory.iterdir())
    lines = [f"{directory} written: {size(n_bytes)}"]
    lines.append(f'next: [models.sources] {Vllm.name} = "{directory}" under the model in the plan')
    print_lines({"path": str(directory), "bytes": n_bytes}, lines, json_)
