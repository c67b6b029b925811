"""Where Switchyard keeps its own files, and the only place that reads the environment."""

from __future__ import annotations

import os
import socket
from importlib import metadata
from pathlib import Path

from engines.errors import BadInput


def home() -> Path:
    """The absolute `$SWITCHYARD_HOME`, or `~/.switchyard`; it is not created here."""
    named = os.environ.get("SWITCHYARD_HOME", "").strip()
    try:
        return Path(named or "~/.switchyard").expanduser().absolute()
    except RuntimeError as problem:
        raise BadInput(f"no home directory for {named or 'this user'}: set SWITCHYARD_HOME to a directory") from problem


def engines_folder() -> Path:
    """Where engines lie that were got once for this user, outside of any `home()`: `NAME-VERSION` each."""
    data = os.environ.get("XDG_DATA_HOME", "").strip() or "~/.local/share"
    return Path(data).expanduser() / "switchyard" / "engines"


def cargo_folder() -> Path:
    """Where cargo keeps what it compiled for us, the same for programs and examples: `$CARGO_TARGET_DIR` or a cache."""
    cache = os.environ.get("XDG_CACHE_HOME", "").strip() or "~/.cache"
    named = os.environ.get("CARGO_TARGET_DIR", "").strip()
    return Path(named).absolute() if named else Path(cache).expanduser() / "switchyard-cargo"


def host() -> str:
    """This host's name in a fleet: `$SWITCHYARD_HOST`, else the machine's; every home on one database needs its own."""
    return os.environ.get("SWITCHYARD_HOST", "").strip() or socket.gethostname()


def program_version() -> str:
    """The version of this program; "checkout" where it is not installed."""
    try:
        return metadata.version("switchyard-llm")
    except metadata.PackageNotFoundError:
        return "checkout"


def database_url() -> str | None:
    """`$SWITCHYARD_DATABASE_URL` (a fleet's PostgreSQL), or None: the records then live in `home()`."""
    return os.environ.get("SWITCHYARD_DATABASE_URL", "").strip() or None
