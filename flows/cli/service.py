"""`switchyard service`: the yard as a systemd user unit: written, started at boot, shown, removed.

Quoting and specifiers follow systemd.syntax(7), systemd.service(5) and systemd.exec(5). The clients' key is never in
the unit: its variable is read from a file that only its owner can open.
"""

import contextlib
import glob
import math
import os
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from jinja2 import Template

import flows
from engines.errors import BadInput, SwitchyardError
from engines.home import home
from engines.whole_file import write_whole
from engines.yard.client import YardClient
from flows.cli.options import Json, PlanFile
from flows.cli.output import print_lines
from migrations.plan import Plan
from migrations.plan_file import load_plan, plan_path

UNIT = "switchyard.service"
ENGINES_END_S = 15  # after the requests in flight: engines get TERM, TERM, KILL; then the ports close
STEPS_SINCE = 254  # the systemd that knows RestartSteps=
KEPT = ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")  # a user manager has none of the shell's: engines hide
PLAIN = re.compile(r"[\w@%+=:,./-]+", re.ASCII)
ANSWER_S = 10.0

service = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Have systemd start the yard at boot: install, show or remove a unit of your own user.",
)


@service.command()
def install(
    plan: PlanFile = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the unit; change nothing.")] = False,
    json_: Json = False,
) -> None:
    """Write the unit for a plan and start it now and at every boot; safe to repeat."""
    folder = home()
    path = plan_path(plan, folder)
    loaded = load_plan(path)
    if not loaded.yard.on_loopback and loaded.api_key_env is None:
        raise BadInput(
            f"{path}: yard.host {loaded.yard.host} can be reached from other machines: set "
            'api_key_env = "SWITCHYARD_API_KEY" in it and export that variable, or listen on 127.0.0.1'
        )
    asked = _systemctl("--version", within_s=ANSWER_S)
    version = re.match(r"systemd (\d+)", asked.stdout) if asked else None
    text = unit_text(path, loaded.yard.stop_s, home=folder, systemd=int(version[1]) if version else None)
    if dry_run:
        print_lines({"unit": str(unit_path()), "text": text, "changed": False}, text.splitlines(), json_)
        return
    done = _install(loaded, text, folder)
    lines = [f"{'written' if done['changed'] else 'unchanged'}: {done['unit']}"]
    if done["to_run"]:
        lines += ["systemd is not running here (no user manager answers); where it does, run:"]
        lines += [f"  {command}" for command in done["to_run"]]
    elif done["started"]:
        lines.append("enabled and started; its log: journalctl --user -u switchyard -f")
    else:
        lines.append("enabled, not started")
    print_lines(done, lines + [f"note: {note}" for note in done["notes"]], json_)


@service.command()
def status(json_: Json = False) -> None:
    """Show whether the unit is installed, runs now and starts at boot."""
    unit, there = unit_path(), _manager_answers()
    found = {
        "unit": str(unit),
        "installed": unit.is_file(),
        "systemd": there,
        "active": _word("is-active") if there else None,
        "enabled": _word("is-enabled") if there else None,
    }
    lines = [f"installed: {unit}" if found["installed"] else "not installed: run `switchyard service install`"]
    if not there:
        lines.append("systemd is not running here (no user manager answers)")
    elif found["installed"]:
        lines += [f"active: {found['active']}", f"at boot: {found['enabled']}"]
    print_lines(found, lines, json_)


@service.command()
def uninstall(json_: Json = False) -> None:
    """Stop the service after finishing the requests in flight, disable and remove it; safe to repeat."""
    unit, kept = unit_path(), _environment_file()
    installed, there = unit.is_file(), _manager_answers()
    if installed and there:
        _run("disable", "--now", UNIT)
    for left in (unit, unit.parent / "default.target.wants" / UNIT):
        left.unlink(missing_ok=True)
    if installed and there:
        _run("daemon-reload")
    lines = [f"removed: {unit}" if installed else "not installed; nothing to remove"]
    if kept.is_file() and installed:
        lines.append(f"kept: {kept}")
    print_lines({"unit": str(unit), "removed": installed, "kept": str(kept) if kept.is_file() else None}, lines, json_)


# --- the unit


def unit_path() -> Path:
    """Path of this user's unit."""
    return _config(os.environ) / "systemd" / "user" / UNIT


def unit_text(
    plan: Path,
    stop_s: float,
    *,
    home: Path,
    systemd: int | None,
    python: str = sys.executable,
    environment: Mapping[str, str] = os.environ,
) -> str:
    """The unit that serves `plan`. Raises BadInput for a path that a unit cannot hold.

    `systemd` is its version, None where unknown: from 254 on the pause between restarts grows.
    """
    root = Path(flows.__file__).absolute().parent.parent  # where Python finds our packages
    given = {"SWITCHYARD_HOME": str(home), **{name: environment[name] for name in KEPT if environment.get(name)}}
    given["PYTHONSAFEPATH"] = "1"
    if root.name not in ("site-packages", "dist-packages"):  # a checkout
        given["PYTHONPATH"] = str(root)
    # arguments, not the program, have their `$` expanded
    command = [python, "-m", "flows.cli", "serve", str(plan).replace("$", "$$")]
    template = Template(Path(__file__).with_name("switchyard.service.jinja").read_text(), keep_trailing_newline=True)
    text: str = template.render(
        root=_escaped(str(root)),
        variables=[_quoted(f"{name}={value}") for name, value in given.items()],
        key_file=_escaped(glob.escape(str(_environment_file(environment)))),
        command=" ".join(map(_quoted, command)),
        stop_s=math.ceil(stop_s + ENGINES_END_S),
        pause_grows=systemd is not None and systemd >= STEPS_SINCE,
    )
    return text


def _quoted(text: str) -> str:
    """One word of a unit's value."""
    escaped = _escaped(text)
    if PLAIN.fullmatch(escaped):
        return escaped
    escaped = escaped.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _escaped(text: str) -> str:
    if any(unicodedata.category(sign) in ("Cc", "Cs") for sign in text) or text != text.strip() or text[-1:] == "\\":
        raise BadInput(
            f"{text!r} cannot be written into a systemd unit: a control character, or a space or backslash at its end"
        )
    return text.replace("%", "%%")


def _config(environment: Mapping[str, str]) -> Path:
    named = environment.get("XDG_CONFIG_HOME", "")
    # the XDG base directory specification: relative ones are ignored
    return Path(named) if Path(named).is_absolute() else Path("~/.config").expanduser()


def _environment_file(environment: Mapping[str, str] = os.environ) -> Path:
    return _config(environment) / "switchyard" / "environment"


# --- installing it


def _install(plan: Plan, text: str, folder: Path) -> dict[str, Any]:
    unit = unit_path()
    prepared = [_prepare_key(name) for name in (plan.api_key_env, plan.notify.url_env)]
    starts, notes = all(known for known, _ in prepared), [note for _, notes in prepared for note in notes]
    there = _manager_answers()
    active = there and _word("is-active") == "active"
    changed = not unit.is_file() or unit.read_text() != text
    if changed:
        with _writing(unit):
            write_whole(unit, text, 0o644)
    if not active and YardClient(folder).runs():
        starts = False
        notes.append(
            "a yard runs here already: `switchyard stop`, then `systemctl --user start switchyard` replaces it by the "
            "service"
        )
    if active and changed:
        notes.append("the service runs with its old unit until `systemctl --user restart switchyard`")
    commands = [("daemon-reload",), ("enable", "--now", UNIT) if starts else ("enable", UNIT)]
    if there:
        for command in commands:
            _run(*command)
    notes.append("to start it at boot, before you log in: `loginctl enable-linger`")
    return {
        "unit": str(unit),
        "changed": changed,
        "systemd": there,
        "started": there and starts,
        "to_run": [] if there else [" ".join(("systemctl", "--user", *command)) for command in commands],
        "notes": notes,
    }


def _prepare_key(name: str | None) -> tuple[bool, list[str]]:
    """Whether the key's variable is set, and what is left to do; makes its file, empty, for its owner alone."""
    if name is None:
        return True, []
    file, notes = _environment_file(), []
    with _writing(file), contextlib.suppress(FileExistsError):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(opened, "w") as made:
            made.write(f"# read by systemd for {UNIT}\n# {name}=...\n")
    if file.stat().st_mode & 0o077:
        notes.append(f"others can read {file}: `chmod 600` it")
    known = re.search(rf"^{name}=.*\S", file.read_text(), re.MULTILINE) is not None
    if not known:
        notes.append(f"write {name}=... into {file}, then run `switchyard service install` again")
    return known, notes


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise SwitchyardError(f"{path} cannot be written: {error.strerror}") from error


# --- systemd


def _systemctl(*arguments: str, within_s: float | None = None) -> subprocess.CompletedProcess[str] | None:
    """The ended `systemctl ARG ...`; None where there is none, or it takes longer than `within_s`."""
    try:
        return subprocess.run(["systemctl", *arguments], capture_output=True, text=True, timeout=within_s, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None


def _manager_answers() -> bool:
    done = _systemctl("--user", "show", "--property=Version", within_s=ANSWER_S)
    return done is not None and done.returncode == 0


def _word(question: str) -> str | None:
    """systemd's one-word answer about the unit, whatever its exit code."""
    done = _systemctl("--user", question, UNIT, within_s=ANSWER_S)
    return (done.stdout.strip() or None) if done else None


def _run(*command: str) -> None:
    done = _systemctl("--user", *command)
    if done is None or done.returncode != 0:
        why = done.stderr.strip().replace("\n", "; ") if done else "it could not be run"
        raise SwitchyardError(f"`systemctl --user {' '.join(command)}` failed: {why}")
