"""Getting an engine onto this machine: by pip, or by the vendor's own script when asked, pinned and shown first."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from engines.driver import Driver
from engines.errors import BadInput, EngineError

FETCH_S = 60.0


@dataclass(frozen=True)
class VendorScript:
    """The vendor's installer as fetched: its pinned address, its text and the checksum to confirm."""

    url: str
    version: str
    text: bytes

    @property
    def sha256(self) -> str:
        """Hex digest of the script's bytes."""
        return hashlib.sha256(self.text).hexdigest()


def pip_command(driver: Driver) -> list[str]:
    """The pip call that installs the engine into this Python environment."""
    return [sys.executable, "-m", "pip", "install", *driver.installer.pip]


def install_with_pip(driver: Driver) -> None:
    """Run pip; EngineError with its exit status when it fails. Its own output is shown."""
    done = subprocess.run(pip_command(driver), check=False)
    if done.returncode:
        raise EngineError(f"pip could not install {driver.name} (exit status {done.returncode}, see above)")


def fetch_script(driver: Driver) -> VendorScript:
    """The vendor's script, fetched but not run; BadInput where there is none, EngineError where it cannot be had."""
    installer = driver.installer
    if installer.script_url is None or installer.script_version is None:
        raise BadInput(f"{driver.name} has no vendor script; leave --vendor-script away to install with pip")
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
            done = subprocess.run(["sh", str(path)], env={**os.environ, **driver.installer.script_env}, check=False)
        except OSError as error:
            raise EngineError(f"the installer of {driver.name} could not be run: {error}") from error
    if done.returncode:
        raise EngineError(f"the installer of {driver.name} failed (exit status {done.returncode}, see above)")
    return True
