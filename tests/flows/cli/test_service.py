"""The systemd user unit: what stands in it, and what is asked of a stand-in `systemctl` that notes every call."""

import os
import stat
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from gguf_files import write_gguf
from switchyard_command import json_of

from engines.errors import BadInput
from engines.yard.client import socket_path
from engines.yard.ports.control import listening
from flows.cli.service import unit_text

SYSTEMCTL = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in
  --version) echo "systemd ${VERSION:-252} (252.1)" ;;
  *show*) [ -z "$NO_MANAGER" ] || { echo "Failed to connect to bus: No medium found" >&2; exit 1; }; echo Version=252 ;;
  *is-active*) cat "$ACTIVE" 2>/dev/null || { echo inactive; exit 3; } ;;
  *is-enabled*) echo enabled ;;
  *"enable --now"*) [ -z "$BROKEN" ] || { echo "Failed to enable unit: no" >&2; exit 1; }; echo active > "$ACTIVE" ;;
  *"disable --now"*) rm -f "$ACTIVE" ;;
esac
"""


@pytest.fixture
def calls(tmp_path, environment):
    """What the stand-in was asked, in order; it is the only systemctl there is."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "systemctl").write_text(SYSTEMCTL)
    (folder / "systemctl").chmod(0o755)
    environment["PATH"] = f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin"
    environment["XDG_CONFIG_HOME"] = str(tmp_path / "config of 100%")
    environment |= {"CALLS": str(tmp_path / "calls"), "ACTIVE": str(tmp_path / "active")}
    return lambda: [
        line.removeprefix("--user ").removesuffix(" switchyard.service")
        for line in (tmp_path / "calls").read_text().splitlines()
        if "show" not in line and "--version" not in line and "is-" not in line
    ]


@pytest.fixture
def plan(tmp_path):
    return written_plan(tmp_path)


@pytest.fixture
def unit(environment, calls):
    return Path(environment["XDG_CONFIG_HOME"]) / "systemd" / "user" / "switchyard.service"


def written_plan(folder, first="", last=""):
    write_gguf(folder / "model.gguf")
    path = folder / "my plan.toml"
    path.write_text(
        f'{first}\n[incumbent]\nengine = "llama.cpp"\n[candidate]\nengine = "mistral.rs"\n'
        f'[[models]]\nid = "m"\ngguf = "{folder / "model.gguf"}"\n{last}\n'
    )
    return path


def text_of(plan="/p/switchyard.toml", **changed):
    given = {"home": Path("/h"), "systemd": 252, "python": "/v/bin/python", "environment": {"XDG_CONFIG_HOME": "/c"}}
    return unit_text(Path(plan), 30, **{**given, **changed})


def test_the_unit_serves_the_plan_with_absolute_paths_and_stops_within_its_time():
    lines = text_of().splitlines()
    for line in (
        "ExecStart=/v/bin/python -m flows.cli serve /p/switchyard.toml",
        "Environment=SWITCHYARD_HOME=/h",
        "EnvironmentFile=-/c/switchyard/environment",
        "ExecReload=kill -HUP $MAINPID",
        "KillSignal=SIGTERM",
        "KillMode=mixed",
        "TimeoutStopSec=45",
        "Restart=on-failure",
        "WantedBy=default.target",
    ):
        assert line in lines


def test_spaces_percent_dollar_quotes_and_backslashes_are_quoted():
    """As systemd.syntax(7) has it: C-style escapes in double quotes, `%%` for a specifier's sign, `$$` in arguments."""
    text = text_of('/my "p"/50% $x\\y.toml', home=Path("/h x%y"), python="/v $1/python")
    assert 'ExecStart="/v $1/python" -m flows.cli serve "/my \\"p\\"/50%% $$x\\\\y.toml"\n' in text
    assert 'Environment="SWITCHYARD_HOME=/h x%%y"\n' in text


def test_the_file_of_the_key_is_a_literal_path_though_systemd_globs_it():
    assert "EnvironmentFile=-/c [[]1]%%/switchyard/environment\n" in text_of(environment={"XDG_CONFIG_HOME": "/c [1]%"})


def test_engines_on_the_shells_path_are_found_by_the_service_too():
    text = text_of(environment={"PATH": "/home/u/.cargo/bin:/usr/bin", "HOME": "/home/u", "SECRET": "s"})
    assert "Environment=PATH=/home/u/.cargo/bin:/usr/bin\n" in text
    assert "SECRET" not in text


def test_the_service_imports_nothing_from_its_working_directory():
    """The packages of a checkout are named, not found by standing in it."""
    lines = text_of(environment={"PYTHONPATH": "/theirs"}).splitlines()
    assert "Environment=PYTHONSAFEPATH=1" in lines
    (path,) = [line.partition("=")[2] for line in lines if "PYTHONPATH" in line] or [None]
    (folder,) = [line.partition("=")[2] for line in lines if line.startswith("WorkingDirectory=")]
    assert path == f"PYTHONPATH={folder}" or folder.endswith("-packages")


def test_restarts_back_off_where_systemd_knows_how():
    assert "RestartSteps=" in text_of(systemd=254)
    for older in (252, None):
        assert "RestartSteps=" not in text_of(systemd=older)


def test_a_path_that_no_unit_can_hold_is_refused():
    with pytest.raises(BadInput, match="systemd unit"):
        text_of("/p/two\nlines.toml")


def test_dry_run_prints_the_unit_and_touches_nothing(switchyard, plan, unit, calls):
    done = switchyard("service", "install", plan, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert f'serve "{plan}"\n' in done.stdout
    assert not unit.exists()
    assert calls() == []


def test_install_enables_and_starts_and_a_second_time_changes_nothing(switchyard, plan, unit, calls):
    first = json_of(switchyard("service", "install", plan, "--json"))
    assert (first["changed"], first["started"]) == (True, True)
    assert calls() == ["daemon-reload", "enable --now"]
    before = unit.stat().st_mtime_ns
    second = json_of(switchyard("service", "install", plan, "--json"))
    assert (second["changed"], second["started"]) == (False, True)
    assert unit.stat().st_mtime_ns == before
    assert "loginctl enable-linger" in switchyard("service", "install", plan).stdout


class Answer(BaseHTTPRequestHandler):
    """All that a look at a yard needs."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def address_string(self):
        return "a unix socket"


@pytest.fixture
def yard_in_front(home):
    """Something that answers on the control socket, as a yard in a terminal would."""
    socket_path(home).parent.mkdir(parents=True)
    server = HTTPServer(("", 0), Answer, bind_and_activate=False)
    server.socket.close()
    server.socket = listening(socket_path(home))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_yard_in_a_terminal_is_left_alone_and_the_service_waits_for_it(switchyard, plan, calls, yard_in_front):
    done = json_of(switchyard("service", "install", plan, "--json"))
    assert done["started"] is False
    assert calls() == ["daemon-reload", "enable"]
    assert any("switchyard stop" in note for note in done["notes"])


def test_install_says_that_a_running_service_keeps_its_old_unit(switchyard, plan, calls, environment):
    switchyard("service", "install", plan)
    environment["SWITCHYARD_HOME"] += "2"
    assert "systemctl --user restart switchyard" in switchyard("service", "install", plan).stdout


@pytest.mark.parametrize("nowhere", ["no manager", "no systemctl"])
def test_without_systemd_the_unit_is_written_and_the_commands_are_named(
    switchyard, plan, unit, calls, environment, nowhere
):
    if nowhere == "no manager":
        environment["NO_MANAGER"] = "1"
    else:
        environment["PATH"] = str(plan.parent / "empty")
    done = switchyard("service", "install", plan)
    assert done.returncode == 0, done.stderr
    assert unit.is_file()
    assert "systemctl --user daemon-reload" in done.stdout
    assert "systemctl --user enable --now switchyard.service" in done.stdout
    assert "systemd is not running here" in switchyard("service", "status").stdout


@pytest.mark.parametrize(
    ("last", "words"),
    [
        ('[yard]\nport = "x"', "yard.port"),
        ('[yard]\nhost = "0.0.0.0"', "api_key_env"),
    ],
)
def test_a_bad_plan_is_refused_before_anything_is_written(switchyard, tmp_path, unit, calls, last, words):
    done = switchyard("service", "install", written_plan(tmp_path, last=last))
    assert done.returncode == 2
    assert words in done.stderr
    assert not unit.exists()


def test_the_key_is_asked_for_in_a_private_file_and_nothing_starts_without_it(
    switchyard, tmp_path, unit, calls, environment
):
    plan = written_plan(tmp_path, first='api_key_env = "YARD_KEY"')
    environment["YARD_KEY"] = "secret-of-the-shell"
    done = json_of(switchyard("service", "install", plan, "--json"))
    file = Path(environment["XDG_CONFIG_HOME"]) / "switchyard" / "environment"
    assert done["started"] is False
    assert any("YARD_KEY" in note for note in done["notes"])
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "secret-of-the-shell" not in unit.read_text() + file.read_text()
    file.write_text("YARD_KEY=k\n")
    assert json_of(switchyard("service", "install", plan, "--json"))["started"] is True
    assert file.read_text() == "YARD_KEY=k\n"
    file.chmod(0o644)
    assert "chmod 600" in switchyard("service", "install", plan).stdout


def test_what_systemd_refuses_is_one_line(switchyard, plan, calls, environment):
    environment["BROKEN"] = "1"
    done = switchyard("service", "install", plan)
    assert done.returncode == 5
    assert "Failed to enable unit" in done.stderr


def test_status_tells_installed_active_and_enabled(switchyard, plan, calls):
    before = json_of(switchyard("service", "status", "--json"))
    assert before["installed"] is False
    switchyard("service", "install", plan)
    after = json_of(switchyard("service", "status", "--json"))
    assert (after["installed"], after["active"], after["enabled"]) == (True, "active", "enabled")


def test_uninstall_stops_disables_and_removes_and_is_safe_twice(switchyard, plan, unit, calls, environment):
    switchyard("service", "install", plan)
    done = switchyard("service", "uninstall")
    assert done.returncode == 0, done.stderr
    assert not unit.exists()
    assert calls()[-2:] == ["disable --now", "daemon-reload"]
    asked = len(calls())
    again = switchyard("service", "uninstall")
    assert again.returncode == 0
    assert "nothing to remove" in again.stdout
    assert len(calls()) == asked


def test_a_unit_is_what_systemd_takes(switchyard, plan, unit, calls, tmp_path):
    """systemd's own checker finds nothing to say, spaces and percent signs in every path."""
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    switchyard("service", "install", plan)
    try:
        done = subprocess.run(
            ["systemd-analyze", "verify", "--user", unit],
            env={**os.environ, "XDG_RUNTIME_DIR": str(runtime)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except FileNotFoundError:
        pytest.skip("needs systemd-analyze (Debian: apt-get install systemd)")
    assert (done.returncode, done.stderr) == (0, "")
