"""The environment of a process: what its children inherit, what an engine must not see, and what imports from where.

`of_child` is for every process that Switchyard starts (`process.start` applies it), `of_engine` for an engine among
them (`serving.launch`, `driver.probe` and `scrubbed` apply it): no caller has to remember.
"""

from __future__ import annotations

import functools
import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import SecretStr

from engines.errors import BadInput
from engines.redaction import redacted_text

LOOPBACK = ("127.0.0.1", "localhost", "::1")
ROOT = Path(__file__).resolve().parent.parent  # where Python finds our packages: a checkout, or site-packages
OURS = ("SWITCHYARD_", "PREFECT_", "WATCHDOG_", "LISTEN_")
NEEDED = frozenset({"PATH", "HOME", "LD_LIBRARY_PATH", "TMPDIR"})  # whatever a folder in them is called
OURS_BY_NAME = frozenset({"NOTIFY_SOCKET", "SSH_AUTH_SOCK"})
# TOKENIZERS_PARALLELISM and KEYMAP hold no secret
SECRET = re.compile(
    r"(?i)TOKEN(?!IZ)|KEY(?!BOARD|MAP|CODE)|SECRET|PASSWORD|PASSWD|PASSPHRASE|PGPASS|_PASS$|_PAT$|CREDENTIAL|COOKIE"
)
_withheld: set[str] = set()


def withhold(name: str) -> None:
    """Keep the variable `name` from every engine that this process starts from now on."""
    _withheld.add(name)


def key_in(name: str) -> SecretStr | None:
    """The key that the variable `name` holds, which no engine of ours may see; None for no name. Raises BadInput."""
    if not name:
        return None
    withhold(name)
    if not (key := os.environ.get(name)):
        raise BadInput(f"api_key_env: the environment variable {name} is not set; export it first")
    return SecretStr(key)


def of_child(base: Mapping[str, str]) -> dict[str, str]:
    """`base` for a process of ours: it imports nothing from its working directory, and no proxy gets loopback traffic.

    PYTHONPATH begins with our own packages, where they are not installed, and loses its relative entries (an empty
    one is the working directory as well).
    """
    given = base.get("no_proxy", base.get("NO_PROXY", ""))  # of two spellings that differ the lower case one counts
    hosts = [host.strip() for host in given.split(",") if host.strip()]
    if "*" not in hosts:  # together with others the asterisk would not be understood by all
        hosts += [host for host in LOOPBACK if host not in hosts]
    env = {**base, "PYTHONSAFEPATH": "1", "no_proxy": ",".join(hosts), "NO_PROXY": ",".join(hosts)}
    paths = [entry for entry in base.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(entry)]
    if ROOT.name not in ("site-packages", "dist-packages"):  # these may hold what shadows the standard library
        paths = [str(ROOT), *(entry for entry in paths if entry != str(ROOT))]
    env.pop("PYTHONPATH", None)
    return {**env, "PYTHONPATH": os.pathsep.join(paths)} if paths else env


def of_engine(base: Mapping[str, str]) -> dict[str, str]:
    """`base` for an engine: without secrets, and without what is meant for Switchyard, Prefect or systemd.

    A secret is a variable that `withhold` named, one named as one (OPENAI_API_KEY, HF_TOKEN), and one whose
    value shows one (a URL with a password). The key that an engine checks is set by its driver, afterwards.
    """
    return {name: value for name, value in base.items() if not _is_kept_from_engines(name, value)}


def apply_to_this_process() -> None:
    """Give this process, and so every child that a library of its starts, the environment of `of_child`."""
    os.environ.update(of_child(os.environ))


@functools.lru_cache(maxsize=64)  # each request's Host is looked at: reading an address takes 20 us
def is_loopback(host: str) -> bool:
    """Whether only this machine answers at `host`, a name or an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


@functools.lru_cache(maxsize=64)
def plain_host(text: str) -> str:
    """A host as it is compared: lower case, no brackets, no dot at its end, an address in its shortest form."""
    name = text.strip("[]").rstrip(".").lower()
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name
    return str(getattr(address, "ipv4_mapped", None) or address)


def without_proxies(base: Mapping[str, str]) -> dict[str, str]:
    """`base` for a process that talks to loopback only: a proxy that cannot be used there breaks every client of it."""
    return {name: value for name, value in base.items() if not re.fullmatch("(?i)(http|https|all|ws|wss)_proxy", name)}


def _is_kept_from_engines(name: str, value: str) -> bool:
    return name not in NEEDED and (
        name in _withheld
        or name in OURS_BY_NAME
        or name.startswith(OURS)
        or SECRET.search(name) is not None
        or redacted_text(value) != value
    )
