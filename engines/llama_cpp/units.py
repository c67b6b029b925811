"""Units of systemd, quadlets of podman and programs of supervisor, as shell text of what they start."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from engines.llama_cpp.shell import read_env_file

SECTION = re.compile(r"^\s*\[([\w:.-]+)\]\s*$", re.MULTILINE)
WORD = re.compile(r"""(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|\\.|[^\s"'\\])+""", re.DOTALL)
QUOTED = re.compile(
    r"""(?P<quote>["'])(?P<text>(?:\\.|(?!(?P=quote)).)*)(?P=quote)|(?P<plain>(?:\\.|[^"'\\])+)""", re.DOTALL
)
ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|[0-7]{3}|.)", re.DOTALL)
ESCAPES = dict(zip("abfnrtvs\\\"'", "\a\b\f\n\r\t\v \\\"'", strict=True))
OPEN = re.compile(r"\$\$|\$\{(\w+)\}|%[A-Za-z]|%%")
# supervisor's words for it
SAME = {"command": "ExecStart", "directory": "WorkingDirectory", "environment": "Environment"}
# quadlet's keys as options of `podman run`
OPTIONS = {
    "PublishPort": "-p",
    "Volume": "-v",
    "Mount": "--mount",
    "EnvironmentFile": "--env-file",
    "Network": "--network",
    "Entrypoint": "--entrypoint",
    "WorkingDir": "-w",
    "Secret": "--secret",
}
LIMITS = re.compile(r"Nice|CPU\w+|NUMA\w+|Memory\w+|Limit\w+|IO\w+|AllowedCPUs|Slice|User|DynamicUser|RootDirectory")


@dataclass
class Unit:
    """What a unit starts: shell text of its command, and the variables and the folder that it runs with."""

    text: str
    env: dict[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    used: frozenset[str] = frozenset()  # variables that the command itself names
    notes: list[str] = field(default_factory=list)


def is_unit(text: str) -> bool:
    return (SECTION.search(text) is not None and "=" in text) or re.match(r"\s*Exec(Start)?\s*=", text) is not None


def read_unit(text: str, cwd: Path | None) -> Unit:
    """The last command that `text`, with its drop-ins behind it, starts; of a quadlet the `podman run` that it is."""
    sections = _sections(text)
    program = next((sections[name] for name in sections if name.startswith("program:")), {})
    whole = {**sections.get("", {}), **program, **sections.get("Service", {}), **sections.get("Container", {})}
    assigned = [
        word for value in whole.get("Environment", ()) for word in _words(value.replace('",', '" ')) if "=" in word
    ]
    unit = Unit("", dict(word.split("=", 1) for word in assigned))
    unit.cwd = Path(whole["WorkingDirectory"][-1].lstrip("-")) if whole.get("WorkingDirectory") else cwd
    limits = [f"{key}=" for key in sections.get("Service", {}) if LIMITS.fullmatch(key)]
    if limits:
        unit.notes.append(f"{' '.join(limits)}: of the unit; the engine that the yard starts runs without")
    if "Container" in sections:
        unit.text = shlex.join(_podman(whole, unit.env))
        unit.env = {}
        return unit
    for name in whole.get("EnvironmentFile", ()):
        found = read_env_file(name, cwd)
        unit.env |= found or {}
        if found is None:
            missing = "another file, which is not read; its variables are missing here"
            unit.notes.append(f"EnvironmentFile {name}: {missing}")
    line = (whole.get("ExecStart") or whole.get("Exec") or [""])[-1]
    known = {"HOME": str(Path.home()), **unit.env}
    unit.used = frozenset(name for name in known if re.search(rf"\$\{{?{name}\b", line))
    unit.text = " ".join(_for_shell(word, known) for word in _words(re.sub(r"^[-@:+!|]*", "", line)))
    return unit


def _sections(text: str) -> dict[str, dict[str, list[str]]]:
    """Each section's keys with all their values; an empty value takes those before it away."""
    lines, rest = [], ""
    for line in text.splitlines():
        if rest and line.lstrip().startswith(("#", ";")):
            continue
        rest += line
        if rest.endswith("\\"):
            rest = rest[:-1] + " "
        else:
            lines.append(rest)
            rest = ""
    sections: dict[str, dict[str, list[str]]] = {}
    section = sections.setdefault("", {})
    for line in [*lines, rest]:
        if found := SECTION.match(line):
            section = sections.setdefault(found[1], {})
        elif "=" in line and not line.lstrip().startswith(("#", ";")):
            key, _, value = line.partition("=")
            key = SAME.get(key.strip(), key.strip())
            section[key] = [*section.get(key, ()), _specified(value.strip())] if value.strip() else []
    return sections


def _specified(text: str) -> str:
    known = {"%h": str(Path.home()), "%u": os.environ.get("USER", "root"), "%t": "/run", "%T": "/tmp"}
    return re.sub("%[A-Za-z%]", lambda found: known.get(found[0], found[0]), text)


def _words(text: str) -> list[str]:
    """The words of a line, as systemd splits it: a backslash that it does not know stays."""
    return ["".join(_unquoted(found) for found in QUOTED.finditer(word)) for word in WORD.findall(text)]


def _unquoted(found: re.Match[str]) -> str:
    text = found["plain"] or found["text"] or ""
    return ESCAPE.sub(lambda escape: ESCAPES.get(escape[1]) or _coded(escape), text)


def _coded(found: re.Match[str]) -> str:
    code = found[1]
    if len(code) == 3:
        return chr(int(code[1:], 16) if code[0] == "x" else int(code, 8))
    return found[0]


def _for_shell(word: str, variables: Mapping[str, str]) -> str:
    """A word with its variables as a shell is to read it: `$NAME` alone may be several, an unknown one stays open."""
    if (found := re.fullmatch(r"\$(\w+)", word)) is not None:
        return " ".join(map(shlex.quote, variables[found[1]].split())) if found[1] in variables else word
    parts, at = [], 0
    for found in OPEN.finditer(word):
        parts.append(shlex.quote(word[at : found.start()]) if found.start() > at else "")
        if found[0] in ("$$", "%%"):
            parts.append(shlex.quote(found[0][0]))
        elif found[1] in variables:
            parts.append(shlex.quote(variables[found[1]]))
        else:
            parts.append(f'"{found[0]}"' if found[1] else f'"${{{found[0]}}}"')
        at = found.end()
    return "".join([*parts, shlex.quote(word[at:]) if at < len(word) or not word else ""])


def _podman(container: Mapping[str, list[str]], env: Mapping[str, str]) -> list[str]:
    """The `podman run` of a quadlet's [Container] section."""
    words = ["podman", "run"]
    for key, option in OPTIONS.items():
        words += [word for value in container.get(key, ()) for word in (option, value)]
    words += [word for name, value in env.items() for word in ("-e", f"{name}={value}")]
    words += [word for value in container.get("PodmanArgs", ()) for word in _words(value)]
    return [*words, *container.get("Image", ())[-1:], *_words((container.get("Exec") or [""])[-1])]
