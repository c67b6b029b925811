"""`switchyard requantize`: a model file in another quant, to try which kernels an engine has."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from engines.model import requantize as quants
from engines.units import number_of, size
from flows.cli.options import Json
from flows.cli.output import errors, print_lines


def requantize(
    model: Annotated[Path, typer.Argument(help="The model file (GGUF, not split).")],
    to: Annotated[str, typer.Option(help=f"The kind of its weights: {', '.join(quants.FILE_TYPES)}.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where it goes; MODEL.KIND.gguf here.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
    json_: Json = False,
) -> None:
    """Write a model in another quant, tensor by tensor, and print what its weights lose; no K quants.

    An engine may be slow for one quant only: evaluate the model in another before you give up on the engine.

    Example: `switchyard requantize model-Q4_1.gguf --to Q8_0`
    """
    target = output or Path(f"{model.name.removesuffix('.gguf')}.{to}.gguf")
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(f"{model.name} as {to}", total=None)

        def progress(n_done: int, total: int) -> None:
            bar.update(task, completed=n_done, total=total)

        done = quants.requantize(model, target, to, force=force, progress=progress)
    lost = (
        f"weights differ by {done.error:.2%} (root mean square), those of {done.worst_tensor} by {done.worst_error:.2%}"
    )
    lines = [
        f"{target} written: {size(done.n_bytes)}, {number_of(done.n_tensors, 'tensor')} as {to}",
        f"  lost: {lost}",
    ]
    if done.was_quantised:
        lines.append(
            "  note: the source is quantised itself; what it lost before comes back from original weights only"
        )
    lines.append(f"next: switchyard preflight {target}, then a plan with it as `gguf`")
    print_lines({**vars(done), "path": str(done.path)}, lines, json_)
