"""Tables and links of a run in Prefect: what is worst stands first, figures have their unit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect.artifacts import create_link_artifact, create_table_artifact

from engines.errors import SwitchyardError
from engines.home import host
from engines.units import quantity
from engines.yard.client import YardClient, public_address
from tasks.verdicts.verdict import Verdict

Row = dict[str, Any]


def worst_first(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The rows by their verdict, FAIL before PASS, in their order otherwise."""
    return sorted(map(dict, rows), key=lambda row: -Verdict(row["verdict"]).badness)


def check_rows(models: Sequence[Mapping[str, Any]], *, required: bool = False) -> list[Row]:
    """One row a check of these models (`required`: only those that hold the gate), worst first."""
    checks = [(model, check) for model in models for check in model["checks"] if check["required"] or not required]
    return worst_first(
        {
            "verdict": check["verdict"],
            "model": model["model"],
            "check": check["check"],
            "value": "" if check["value"] is None else quantity(check["value"], check["unit"], check["limit"]),
            "limit": "" if check["limit"] is None else quantity(check["limit"], check["unit"]),
            "why": check["why"],
        }
        for model, check in checks
    )


def put_table(key: str, rows: Sequence[Mapping[str, Any]], outcome: Mapping[str, Any]) -> None:
    """A table artifact of the run, described by its verdict and its report."""
    report = f" Report: {outcome['report']}" if outcome.get("report") else ""
    description = f"Run {outcome['run_id']}: {outcome['verdict']}.{report}"
    create_table_artifact(key=key, table=[dict(row) for row in rows], description=description)


def put_report_link(home: Path, report: Path) -> None:
    """A link to the report: served by the yard where one runs, else the file on this host."""
    try:
        link = f"{public_address(YardClient(home).status()['address'])}/yard/reports/{report.name}"
        served = "served by the yard"
    except SwitchyardError:
        link, served = report.as_uri(), f"a file on {host()}: no yard runs there to serve it"
    create_link_artifact(link, link_text="the report", key="switchyard-report", description=served)
