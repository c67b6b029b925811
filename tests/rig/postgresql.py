"""A PostgreSQL server of its own for a test, on loopback, gone with the block."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.process.serving import free_port

HOW = "apt install postgresql, and pip install 'psycopg[binary]'"


def programs() -> Path:
    """Where PostgreSQL's programs are; skips where they are not."""
    on_path = [Path(found).parent for name in ["initdb"] if (found := shutil.which(name))]
    found = on_path + sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    folder = next((folder for folder in found if (folder / "initdb").exists() and (folder / "pg_ctl").exists()), None)
    if folder is None:
        pytest.skip(f"needs PostgreSQL's initdb and pg_ctl: {HOW}")
    return folder


@contextlib.contextmanager
def server(*databases: str) -> Iterator[str]:
    """USER@HOST:PORT of a server with these empty databases, while the block runs."""
    psycopg = pytest.importorskip("psycopg", reason=HOW)
    where, port = programs(), free_port()
    # it refuses to be root, and a private folder of root's is closed to others
    user: dict[str, Any] = {"user": "nobody", "extra_groups": []} if os.geteuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="switchyard-postgresql-"))

    def run(program: str, *arguments: object) -> None:
        subprocess.run([where / program, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL, **user)

    try:
        if user:
            shutil.chown(folder, "nobody")
        run("initdb", "-D", folder / "data", "-U", "switchyard", "--auth=trust", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        run("pg_ctl", "-D", folder / "data", "-w", "-l", folder / "log", "-o", options, "start")
        try:
            address = f"switchyard@127.0.0.1:{port}"
            with psycopg.connect(f"postgresql://{address}/postgres", autocommit=True) as connection:
                for database in databases:
                    connection.execute(f"CREATE DATABASE {database}")
            yield address
        finally:
            run("pg_ctl", "-D", folder / "data", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)
