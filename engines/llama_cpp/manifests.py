"""Containers of compose files and of Kubernetes manifests, and YAML as these read it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from engines.errors import BadInput
from engines.llama_cpp.containers import Container, of_service
from engines.llama_cpp.shell import read_env_file

INTERPOLATED = re.compile(r"\$\{(?P<name>\w+)(?::?(?P<operator>[-+?])(?P<word>[^{}]*))?\}|\$(?P<bare>[A-Za-z_]\w*)")
REFERENCE = re.compile(r"\$\((\w+)\)")
ESCAPED = "\0"  # what `$$` is while variables are replaced


class _Texts(yaml.SafeLoader):  # type: ignore[misc]
    """Every scalar but null as its text: `on`, `8080:80` and `0.70` are what was written."""


_Texts.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def documents(text: str) -> list[Any]:
    """The text's YAML documents that are tables or lists of tables; none where it is no YAML."""
    try:
        found = list(yaml.load_all(text, _Texts))  # a SafeLoader
    except yaml.YAMLError:
        return []
    return [one for one in found if isinstance(one, dict) or (isinstance(one, list) and isinstance(one[0], dict))]


def of_compose(services: Mapping[str, Any], cwd: Path | None) -> list[Container]:
    """The containers of a compose file in `cwd`, whose `.env` counts."""
    known = (cwd is not None and read_env_file(".env", cwd)) or {}
    found = []
    for service in services.values():
        unknown: set[str] = set()
        service = _interpolated(service, known, unknown)
        if not isinstance(service, Mapping):
            continue
        words = [*_words(service.get("entrypoint")), *_words(service.get("command"))]
        container = of_service(service, words, cwd)
        texts = [*words, *container.env.values()]
        container.open = {text for text in texts for name in unknown if f"${name}" in text or f"${{{name}" in text}
        container.notes += [f"${name}: not set in the compose file; its value is missing here" for name in unknown]
        found.append(container)
    return found


def of_pods(value: Any) -> Iterable[Container]:
    """Every container of a Kubernetes manifest."""
    if isinstance(value, list):
        for item in value:
            yield from of_pods(item)
    elif isinstance(value, Mapping):
        if isinstance(value.get("containers"), list):
            yield from (_of_pod(one, value) for one in value["containers"] if isinstance(one, Mapping))
        for name, item in value.items():
            if name != "containers":
                yield from of_pods(item)


def _of_pod(one: Mapping[str, Any], spec: Mapping[str, Any]) -> Container:
    """A container with its ports as published, its host paths as mounts, and a note on each value kept elsewhere."""
    variables = [each for each in one.get("env") or () if isinstance(each, Mapping)]
    paths = {each.get("name"): (each.get("hostPath") or {}).get("path") for each in spec.get("volumes") or ()}
    service = {
        "image": one.get("image"),
        "working_dir": one.get("workingDir"),
        "environment": [f"{each['name']}={each['value']}" for each in variables if "value" in each],
        "ports": [
            {"published": each.get("hostPort") or each.get("containerPort"), "target": each.get("containerPort")}
            for each in one.get("ports") or ()
        ],
        "volumes": [
            {
                "source": "/".join(
                    filter(None, (paths.get(each.get("name")) or each.get("name"), each.get("subPath")))
                ),
                "target": each.get("mountPath"),
            }
            for each in one.get("volumeMounts") or ()
        ],
        "network_mode": "host" if spec.get("hostNetwork") == "true" else None,
    }
    container = of_service(service, (), None)
    words = [str(word) for word in (*(one.get("command") or ()), *(one.get("args") or ()))]
    container.words = [REFERENCE.sub(lambda found: container.env.get(found[1], found[0]), word) for word in words]
    container.open = {word for word in container.words if REFERENCE.search(word)}
    container.used = {name for word in words for name in REFERENCE.findall(word)}
    for each in variables:
        if "value" not in each:
            container.withheld(str(each.get("name")), "its value is kept in the cluster")
    if one.get("envFrom"):
        container.withheld("envFrom", "its value is kept in the cluster")
    return container


def _interpolated(value: Any, known: Mapping[str, str], unknown: set[str]) -> Any:
    """`value` with `${NAME:-default}` and `$$` replaced in every text; names that nobody gives go to `unknown`."""

    def replaced(found: re.Match[str]) -> str:
        name = found["name"] or found["bare"]
        if found["operator"] == "+":
            return found["word"] if known.get(name) else ""
        if name in known:
            return known[name]
        if found["operator"] == "-":
            return found["word"]
        unknown.add(name)
        return found[0]

    if isinstance(value, Mapping):
        return {key: _interpolated(item, known, unknown) for key, item in value.items()}
    if isinstance(value, list):
        return [_interpolated(item, known, unknown) for item in value]
    if not isinstance(value, str):
        return value
    before, text = "", value.replace("$$", ESCAPED)
    while text != before:  # a default may hold a variable
        before, text = text, INTERPOLATED.sub(replaced, text)
    return text.replace(ESCAPED, "$")


def _words(value: Any) -> list[str]:
    """The words of a command: a list as it is, a text as a shell splits it."""
    if isinstance(value, list):
        return [str(word) for word in value]
    try:
        return shlex.split(value or "")
    except ValueError:
        raise BadInput("the command cannot be read: no closing quotation; check its quotes") from None
