from typing import Annotated

import typer

from engines import install as installing
from engines.crates import install_from_crates
from engines.errors import BadInput
from engines.home import home
from engines.model.free_memory import free_memory
from engines.registry import driver
from flows.cli.output import errors, out


def install(
    engine: Annotated[str, typer.Argument(help="llama.cpp or mistral.rs")],
    vendor_script: Annotated[bool, typer.Option("--vendor-script", help="Use the vendor's pinned script.")] = False,
    from_crates: Annotated[
        bool, typer.Option("--from-crates", help="Build its program from crates.io with cargo, for this CPU.")
    ] = False,
    sha256: Annotated[str | None, typer.Option(help="Confirm the vendor's script by its checksum.")] = None,
) -> None:
    """Install an engine: with pip, with the vendor's script whose checksum you confirm, or with cargo.

    Example: `switchyard install mistral.rs`
    """
    chosen = driver(engine)
    if from_crates:
        if vendor_script:
            raise BadInput("--from-crates and --vendor-script cannot be combined")
        program = install_from_crates(chosen, free_memory().ram_bytes, errors.print)
        found = chosen.find("binary", program)
        out.print(f'{engine} {found.version} is installed: {found.where} (`form = "binary"` takes it in a plan)')
        return
    if vendor_script:
        script = installing.fetch_script(chosen)
        if not installing.run_script(chosen, script, lambda fetched: _confirmed(fetched, sha256)):
            raise BadInput("nothing was installed: the script's checksum was not confirmed")
    else:
        installing.install_with_pip(chosen, home())
    found = chosen.find()
    out.print(f"{engine} {found.version} is installed: {found.where}")


def _confirmed(script: installing.VendorScript, expected: str | None) -> bool:
    errors.print(f"script:  {script.url}\nversion: {script.version}\nsha256:  {script.sha256}")
    if expected is None:
        return typer.confirm("Run this script?", default=False, err=True)
    if expected.lower() != script.sha256:
        raise BadInput(f"--sha256: the fetched script has {script.sha256}; nothing was run")
    return True
