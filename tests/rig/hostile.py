"""A folder as another Prefect project may have it, in which everything that is imported says so."""

from pathlib import Path

PACKAGES = (
    "flows",
    "tasks",
    "engines",
    "migrations",
    "prefect",
    "httpx",
    "uvicorn",
    "sqlmodel",
    "mistralrs",
    "xllamacpp",
)
MODULES = ("json", "typing", "typer", "rich", "sitecustomize", "usercustomize", "gguf", "socket", "psutil")
MARK = "imported-"


def hostile_folder(folder: Path, packages=PACKAGES, modules=MODULES) -> Path:
    """`folder`, made, with these names in it and with settings of a Prefect that answers nowhere."""
    folder.mkdir(parents=True)
    for name in packages:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(_says(folder, name))
    for name in modules:
        (folder / f"{name}.py").write_text(_says(folder, name))
    (folder / ".env").write_text("PREFECT_API_URL=http://127.0.0.1:9/api\nPREFECT_HOME=/nowhere\n")
    (folder / "prefect.toml").write_text(
        'profiles_path = "/nowhere"\n[api]\nurl = "http://127.0.0.1:9/api"\nbroken = ['
    )
    (folder / "pyproject.toml").write_text('[tool.prefect]\nhome = "/nowhere"\n[tool.prefect.api]\nkey = "theirs"\n')
    return folder


def imported(folder: Path) -> list[str]:
    """What of it was imported so far."""
    return sorted(found.name.removeprefix(MARK) for found in folder.glob(f"{MARK}*"))


def _says(folder: Path, name: str) -> str:
    return f"open({str(folder / (MARK + name))!r}, 'a').write('x')\nraise SystemExit('{name} of the caller')\n"
