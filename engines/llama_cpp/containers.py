"""llama-server in a container: `docker run` and its kin, and services of compose files, as a command of this host."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.llama_cpp.argv import EVERY_HOST, OPEN, LlamaServerCommand, Published, is_program, read_flags
from engines.llama_cpp.shell import read_env_file

RUNNERS = frozenset({"docker", "podman", "nerdctl", "docker.exe"})
# options of `docker run` that stand alone; each other long one takes a value
# fmt: off
ALONE = frozenset((
    "--detach", "--interactive", "--tty", "--rm", "--init", "--privileged", "--read-only", "--publish-all", "--quiet",
    "--no-healthcheck", "--oom-kill-disable", "--sig-proxy", "--disable-content-trust", "--replace", "--tls-verify",
))
# fmt: on
SHORT_ALONE = frozenset("ditPq")
IMAGE = re.compile(r"llama[._-]?(cpp|server)", re.IGNORECASE)
PORT = re.compile(
    r"(?:(?:(?P<ip>[\d.]+|\[[^\]]+\]):)?(?P<outside>\d*)(?:-\d+)?:)?(?P<inside>\d+)(?:-(?P<last>\d+))?(?:/tcp)?"
)
# of the images that llama.cpp publishes (.devops/*.Dockerfile)
DEFAULT_ENV = {"LLAMA_ARG_HOST": EVERY_HOST, "HOME": "/root"}
DEFAULT_FOLDER = "/app"
# limits that a process of this host would not have
LIMITS = re.compile(r"--(gpus|cpus?|cpuset.*|memory.*|device-.*)|-m|-c")
KEYS = ("LLAMA_API_KEY", "LLAMA_ARG_API_KEY_FILE")
BUILD_NOTE = (
    "runs in a container: the incumbent becomes a llama-server found on this machine, which is another build than the "
    "image's; set `binary` under [incumbent] to compare with a build of your choice"
)


@dataclass
class Container:
    """What a container is started with."""

    image: str = ""
    words: list[str] = field(default_factory=list)  # what follows the image
    env: dict[str, str] = field(default_factory=dict)
    volumes: list[tuple[str, str]] = field(default_factory=list)  # place on this host, place inside
    folder: str = DEFAULT_FOLDER  # that it starts in
    published: Published = field(default_factory=dict)
    is_published: bool = False
    host_network: bool = False
    used: set[str] = field(default_factory=set)  # variables that the words themselves name
    open: set[str] = field(default_factory=set)  # words that hold what only a shell knows
    notes: list[str] = field(default_factory=list)

    def mount(self, source: str, target: str) -> None:
        if source.startswith(("/", ".", "~")):
            self.volumes.append((os.path.expanduser(source), target.rstrip("/") or "/"))
        elif target:
            self.notes.append(f"volume {source} at {target}: not a path of this host; give the file with --model")

    def publish(self, text: str) -> None:
        """`[[IP:]HOST:]CONTAINER`, each a port or a range; of two for one port the first counts."""
        if (found := PORT.fullmatch(text.strip())) is None:
            return
        self.is_published = True
        if not found["outside"]:
            self.notes.append(
                f"port {text}: outside it is another at each start; the plan has the one inside; change yard.port"
            )
            return
        first, ip = int(found["inside"]), (found["ip"] or EVERY_HOST).strip("[]")
        for inside in range(first, min(int(found["last"] or first), first + 1000) + 1):
            self.published.setdefault(inside, (ip, int(found["outside"]) + inside - first))

    def variable(self, text: str) -> None:
        name, equals, value = text.partition("=")
        if equals:
            self.env[name] = value
        else:
            self.withheld(name, "its value comes from the shell, and is not known here")

    def withheld(self, name: str, why: str) -> None:
        """Note a variable whose value is not here; that there is a key matters, whatever it is."""
        self.notes.append(f"variable {name}: {why}; left out")
        if name in KEYS:
            self.env[name] = "?"

    def env_file(self, name: str, cwd: Path | None, what: str) -> None:
        found = read_env_file(name, cwd)
        if found is None:
            self.notes.append(f"{what} {name}: another file, which is not read; its variables are missing here")
        self.env |= {name: value for name, value in (found or {}).items() if name not in self.env}

    def outside(self, text: str) -> str:
        """A path inside as one of this host; one that no volume holds stays."""
        inside = posixpath.normpath(posixpath.join(self.folder, text))
        for source, target in sorted(self.volumes, key=lambda volume: -len(volume[1])):
            if inside == target or inside.startswith(target.rstrip("/") + "/"):
                return os.path.normpath(source + "/" + inside[len(target.rstrip("/")) :].lstrip("/"))
        return text

    def read(self, cwd: Path | None) -> LlamaServerCommand:
        """The command in words of a plan. Raises BadInput like `read_flags`."""
        words = self.words
        if words and (is_program(words[0]) or (words[0] in ("--server", "-s") and ":full" in self.image)):
            words = words[1:]  # the image's own entry point, or the whole one's word for it
        env = {**DEFAULT_ENV, **self.env} if IMAGE.search(self.image) else self.env
        published = None if self.host_network or not self.is_published else self.published
        command = read_flags(words, environ=env, cwd=cwd, published=published, outside=self.outside, open=self.open)
        command.note(f"{self.image or 'the command'} {BUILD_NOTE}")
        if not self.host_network and not self.is_published:
            command.note("no port is published: the plan has the port inside the container; change yard.port if needed")
        for note in self.notes:
            command.note(note)
        return command


def is_runner(words: Sequence[str]) -> bool:
    """True for `docker run`, `podman run` and the like with an image or a command of llama.cpp's."""
    at = next((at for at, word in enumerate(words) if os.path.basename(word) in RUNNERS), len(words))
    if {"run", "create"}.isdisjoint(words[at:]):
        return False
    container = of_run(words)
    return IMAGE.search(container.image) is not None or any("llama-server" in word for word in container.words)


def of_run(words: Sequence[str], cwd: Path | None = None, open: Set[str] = frozenset()) -> Container:
    """The container that `docker run ...` starts in folder `cwd`; `open` are words that only a shell knows."""
    container, entrypoint = Container(open=set(open)), []
    start = next(at for at, word in enumerate(words) if os.path.basename(word) in RUNNERS)
    at = next(at for at in range(start, len(words)) if words[at] in ("run", "create")) + 1
    while at < len(words) and words[at].startswith("-"):
        name, equals, value = words[at].partition("=")
        at += 1
        if name in ALONE or (not name.startswith("--") and set(name[1:]) <= SHORT_ALONE):
            continue
        if not name.startswith("--") and len(name) > 2:  # -p8080:8080, -itp 8080:8080
            letters = name[1:]
            head = letters.lstrip("".join(SHORT_ALONE))
            name, value, equals = f"-{head[:1]}", head[1:] + equals + value, head[1:]
        if not equals and at < len(words):
            value = words[at]
            at += 1
        if name == "--entrypoint":
            entrypoint = [value]
        elif value in open and not value.startswith(KEYS):
            container.notes.append(f"{name} {value}: {OPEN}")
        else:
            _option(container, name, value, cwd)
    container.image, container.words = (words[at] if at < len(words) else ""), [*entrypoint, *words[at + 1 :]]
    return container


def _option(container: Container, name: str, value: str, cwd: Path | None) -> None:
    if name in ("-p", "--publish"):
        container.publish(value)
    elif name in ("-v", "--volume"):
        source, _, rest = value.partition(":")
        container.mount(source, rest.partition(":")[0])
    elif name == "--mount":
        parts = dict(part.partition("=")[::2] for part in value.split(","))
        source, target = (next((parts[key] for key in keys if key in parts), "") for keys in (SOURCES, TARGETS))
        container.mount(source, target)
    elif name in ("-e", "--env"):
        container.variable(value)
    elif name == "--env-file":
        container.env_file(value, cwd, name)
    elif name in ("--network", "--net"):
        container.host_network = value == "host"
    elif name in ("-w", "--workdir"):
        container.folder = value
    elif name == "--secret":
        container.withheld(value.rpartition("target=")[2], "its value is a secret of the container")
    elif LIMITS.fullmatch(name) and (name, value) != ("--gpus", "all"):
        container.notes.append(f"{name} {value}: a limit of the container; the engine that the yard starts has none")


SOURCES, TARGETS = ("source", "src"), ("target", "destination", "dst")


def of_service(service: Mapping[str, Any], words: Sequence[str], cwd: Path | None) -> Container:
    """The container of one service in a compose file in `cwd`; `words` is its entry point and command."""
    container = Container(image=str(service.get("image") or ""), words=list(words))
    container.folder = str(service.get("working_dir") or DEFAULT_FOLDER)
    for text in _pairs(service.get("environment")):
        container.variable(text)
    files = service.get("env_file") or []
    for file in files if isinstance(files, list) else [files]:
        container.env_file(str(file.get("path") if isinstance(file, Mapping) else file), cwd, "env_file")
    for port in service.get("ports") or []:
        if isinstance(port, Mapping):
            ip = str(port.get("host_ip") or "")
            address = f"[{ip}]:" if ":" in ip else f"{ip}:" if ip else ""
            outside = f"{port['published']}:" if port.get("published") else ""
            container.publish(f"{address}{outside}{port.get('target')}")
        else:
            container.publish(str(port))
    for volume in service.get("volumes") or []:
        source, target = _volume(volume)
        container.mount(source, target)
    container.host_network = service.get("network_mode") == "host"
    return container


def _volume(volume: Any) -> tuple[str, str]:
    if isinstance(volume, Mapping):
        return str(volume.get("source") or ""), str(volume.get("target") or "")
    source, _, rest = str(volume).partition(":")
    return source, rest.partition(":")[0]


def _pairs(values: Any) -> Iterable[str]:
    """`NAME=value` of each variable; a name alone where no value is given."""
    if isinstance(values, Mapping):
        return [str(name) if value is None else f"{name}={value}" for name, value in values.items()]
    return [str(value) for value in values or []]
