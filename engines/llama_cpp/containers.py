"""llama-server in a container: `docker run` and its kin, compose files and quadlets, as a command of this host."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.llama_cpp.argv import EVERY_HOST, LlamaServerCommand, Published, is_program, read_flags

RUNNERS = frozenset({"docker", "podman", "nerdctl", "docker.exe"})
# options of `docker run` that stand alone; each other long one takes a value
# fmt: off
ALONE = frozenset((
    "--detach", "--interactive", "--tty", "--rm", "--init", "--privileged", "--read-only", "--publish-all", "--quiet",
    "--no-healthcheck", "--oom-kill-disable", "--sig-proxy", "--disable-content-trust", "--replace", "--tls-verify",
))
# fmt: on
SHORT_ALONE = frozenset("ditPq")
IMAGE = re.compile(r"llama[._-]?(cpp|server)|ggml-org|ggerganov", re.IGNORECASE)
PORT = re.compile(r"(?:(?:(?P<ip>[\d.]+|\[[^\]]+\]):)?(?P<outside>\d+):)?(?P<inside>\d+)(?:/tcp)?")
DEFAULT_ENV = {"LLAMA_ARG_HOST": EVERY_HOST}  # of the images that llama.cpp publishes (.devops/*.Dockerfile)
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
    published: Published = field(default_factory=dict)
    is_published: bool = False
    host_network: bool = False
    notes: list[str] = field(default_factory=list)

    def mount(self, source: str, target: str) -> None:
        if source.startswith(("/", ".", "~")):
            self.volumes.append((os.path.expanduser(source), target.rstrip("/") or "/"))

    def publish(self, text: str) -> None:
        """`[[IP:]HOST:]CONTAINER`; of two for one port the first counts."""
        if found := PORT.fullmatch(text.strip()):
            self.is_published = True
            if found["outside"]:
                where = found["ip"] or EVERY_HOST, int(found["outside"])
                self.published.setdefault(int(found["inside"]), where)

    def outside(self, text: str) -> str:
        """A path inside as one of this host; text that names none stays."""
        for source, target in sorted(self.volumes, key=lambda volume: -len(volume[1])):
            if text == target or text.startswith(target.rstrip("/") + "/"):
                return os.path.normpath(source + "/" + text[len(target.rstrip("/")) :].lstrip("/"))
        return text

    def read(self, cwd: Path | None) -> LlamaServerCommand:
        """The command in words of a plan. Raises BadInput like `read_flags`."""
        words = list(self.words)
        if words and (is_program(words[0]) or words[0] in ("--server", "-s")):
            words = words[1:]  # the image's own entry point, or the whole one's word for it
        whole = {**DEFAULT_ENV, **self.env} if IMAGE.search(self.image) else self.env
        env = {name: self.outside(value) for name, value in whole.items()}
        inside = [self.outside(word) for word in words]
        published = None if self.host_network or not self.is_published else self.published
        command = read_flags(inside, environ=env, cwd=cwd, published=published)
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
    return IMAGE.search(container.image) is not None or any(map(is_program, container.words[:1]))


def of_run(words: Sequence[str]) -> Container:
    """The container that `docker run ...` starts."""
    container = Container()
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
        _option(container, name, value)
    container.image, container.words = (words[at] if at < len(words) else ""), list(words[at + 1 :])
    return container


def _option(container: Container, name: str, value: str) -> None:
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
        _variable(container, value)
    elif name == "--env-file":
        container.notes.append(f"--env-file {value}: another file, which is not read; its variables are missing here")
    elif name in ("--network", "--net"):
        container.host_network = value == "host"


SOURCES, TARGETS = ("source", "src"), ("target", "destination", "dst")


def _variable(container: Container, text: str) -> None:
    name, equals, value = text.partition("=")
    if equals:
        container.env[name] = value
    else:
        container.notes.append(f"variable {name}: its value comes from the shell, and is not known here; left out")


def of_service(service: Mapping[str, Any], words: Sequence[str]) -> Container:
    """The container of one service in a compose file; `words` is its entry point and command."""
    container = Container(image=str(service.get("image") or ""), words=list(words))
    for text in _pairs(service.get("environment")):
        _variable(container, text)
    if service.get("env_file"):
        container.notes.append(f"env_file {service['env_file']}: another file, which is not read")
    for port in service.get("ports") or []:
        if isinstance(port, Mapping):
            address = f"{port['host_ip']}:" if port.get("host_ip") else ""
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
        return [str(name) if value is None else f"{name}={_text(value)}" for name, value in values.items()]
    return [str(value) for value in values or []]


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def of_quadlet(section: Mapping[str, Sequence[str]], words: Sequence[str]) -> Container:
    """The container of a quadlet's [Container] section, each key with all its values."""
    container = Container(image=next(iter(section.get("Image", ())), ""), words=list(words))
    for text in section.get("PublishPort", ()):
        container.publish(text)
    for text in section.get("Volume", ()):
        source, target = _volume(text)
        container.mount(source, target)
    container.host_network = "host" in section.get("Network", ())
    return container
