"""Building an engine from crates.io: what cargo is told, what is missing, and that an interrupted build resumes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from fake_driver import FakeDriver
from processes import runs
from waiting import until

from engines import crates
from engines.crates import JOB_BYTES, install_from_crates
from engines.driver import Installer
from engines.environment import of_child
from engines.errors import BadInput, EngineError

PLENTY = 100 * JOB_BYTES
CARGO = """#!{python}
import json, os, pathlib, sys, time
root = pathlib.Path(sys.argv[sys.argv.index("--root") + 1])
here = pathlib.Path(__file__).parent
target = pathlib.Path(os.environ["CARGO_TARGET_DIR"])
compiled = target / "compiled"
kept = compiled.exists()
compiled.touch()
env = {{name: os.environ.get(name) for name in ("CARGO_TARGET_DIR", "RUSTFLAGS")}}
said = {{"argv": sys.argv[1:], "env": env, "kept": kept, "pid": os.getpid()}}
(here / "new.json").write_text(json.dumps(said))
(here / "new.json").rename(here / "said.json")
if (here / "fails").exists():
    sys.exit(101)
while (here / "hangs").exists():
    time.sleep(0.05)
program = root / "bin" / "fake-program"
program.parent.mkdir(parents=True)
program.write_text("#!/bin/sh\\n")
program.chmod(0o755)
"""


class Crate(FakeDriver):
    installer = Installer(pip=(), crate="fake-cli==1.2.3", crate_program="fake-program")


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH, with a cargo and a cc; the folders of data and caches are of the test."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("cargo", CARGO.format(python=sys.executable)), ("cc", "#!/bin/sh\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("DATA", "CACHE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    for name in ("CARGO_HOME", "CARGO_TARGET_DIR", "RUSTFLAGS"):
        monkeypatch.delenv(name, raising=False)
    return folder


def said(tools: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((tools / "said.json").read_text())
    return found


def test_cargo_builds_the_pinned_version_for_this_cpu(tools: Path, tmp_path: Path) -> None:
    """Into a folder of its name and version; a second call finds it there."""
    lines: list[str] = []
    program = install_from_crates(Crate(), PLENTY, lines.append)
    root = tmp_path / "data" / "switchyard" / "engines" / "fake-program-1.2.3"
    assert program == root / "bin" / "fake-program"
    jobs = ["--jobs", str(os.cpu_count())]
    assert said(tools)["argv"] == [
        "install", "--locked", "fake-cli", "--version", "1.2.3", "--root", str(root), *jobs
    ]  # fmt: skip
    target = str(tmp_path / "cache" / "switchyard-cargo")
    assert said(tools)["env"] == {"CARGO_TARGET_DIR": target, "RUSTFLAGS": "-C target-cpu=native"}
    assert len(lines) == 1
    (tools / "said.json").unlink()
    assert install_from_crates(Crate(), None, lines.append) == program
    assert not (tools / "said.json").exists()


def test_a_failed_build_resumes(tools: Path) -> None:
    """What was compiled stays; no program is taken for a whole one."""
    (tools / "fails").touch()
    with pytest.raises(EngineError, match=r"cargo could not build fake-cli 1\.2\.3 \(exit status 101.*rerun to resume"):
        install_from_crates(Crate(), PLENTY, print)
    (tools / "fails").unlink()
    assert install_from_crates(Crate(), PLENTY, print).exists()
    assert said(tools)["kept"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_build_leaves_no_process(tools: Path, how: signal.Signals) -> None:
    """Ctrl-C reaches it, although it runs in a group of its own; and it dies with us."""
    (tools / "hangs").touch()
    code = "from engines import crates; from engines.mistral_rs.driver import MistralRs\n"
    code += "crates.install_from_crates(MistralRs(), None, print)"
    with subprocess.Popen([sys.executable, "-c", code], env=of_child(os.environ), start_new_session=True) as ours:
        until(lambda: (tools / "said.json").exists() and said(tools), "the build to run")
        cargo = psutil.Process(int(str(said(tools)["pid"])))
        ours.send_signal(how)
    until(lambda: not runs(cargo), "the build to end")


@pytest.mark.parametrize(
    ("missing", "line"),
    [
        ("cargo", "no cargo on PATH or in ~/.cargo/bin: install Rust"),
        ("cc", r"no C compiler \(cc\) on PATH"),
        ("memory", "of memory free, a build takes 4"),
        ("disk", "free, building fake-cli takes 3"),
        ("crate", "fake is not on crates.io: leave --from-crates away"),
    ],
)
def test_what_is_missing_is_one_line(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, line: str
) -> None:
    """Before anything is started."""
    if (tools / missing).exists():
        (tools / missing).unlink()
    if missing == "disk":
        monkeypatch.setattr(crates, "DISK_BYTES", shutil.disk_usage(tmp_path).total * 3)
        line = "free, building fake-cli takes"
    driver = FakeDriver() if missing == "crate" else Crate()
    with pytest.raises(BadInput, match=line) as refused:
        install_from_crates(driver, 1 if missing == "memory" else PLENTY, print)
    assert "\n" not in str(refused.value)
    assert not (tools / "said.json").exists()


def test_memory_decides_how_many_compile_at_once(tools: Path) -> None:
    install_from_crates(Crate(), JOB_BYTES + 1, print)
    argv = said(tools)["argv"]
    assert isinstance(argv, list)
    assert argv[-2:] == ["--jobs", "1"]
