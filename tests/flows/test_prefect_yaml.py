"""prefect.yaml and what the flows declare of themselves are the same deployments."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.deployments.runner import RunnerDeployment
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.templating import apply_values

import flows
from engines.home import program_version
from flows.deployments import OFFERS, Offer, deployments, rollback_trigger
from flows.fleet import FLEET

FILE = Path(flows.__file__).parent.parent / "prefect.yaml"
ALL: dict[str, Offer] = {**OFFERS, **FLEET}


def declared(**environ: str) -> dict[str, dict[str, Any]]:
    """The deployments of the file by name, with the environment filled in as `prefect deploy` does it."""
    entry = yaml.safe_load(FILE.read_text())["deployments"]
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("SWITCHYARD_PLAN", raising=False)
        for name, value in environ.items():
            patched.setenv(name, value)
        filled = apply_values(apply_values(entry, dict(os.environ), remove_notset=False), {}, skip_prefixes=["event."])
    return {one["name"]: one for one in filled}


@pytest.fixture(scope="module")
def on_host() -> dict[str, dict[str, Any]]:
    """The file as it is deployed for a host called `a`."""
    return declared(SWITCHYARD_HOST="a", SWITCHYARD_PLAN="/etc/plan.toml")


@pytest.fixture(scope="module")
def served() -> dict[str, RunnerDeployment]:
    """What `switchyard up` serves."""
    made = asyncio.run(deployments(Path("/etc/plan.toml")))
    return {one.name: one for one in made}


def in_file(name: str) -> str:
    return name if name in FLEET else f"{name}-a"


def test_nothing_is_offered_in_one_place_only(on_host: dict[str, Any]) -> None:
    assert set(on_host) == {in_file(name) for name in ALL}


@pytest.mark.parametrize("name", ALL)
def test_the_entrypoint_is_the_flow(name: str, on_host: dict[str, Any]) -> None:
    """A dotted one: the package is installed, and nothing is pulled."""
    assert load_flow_from_entrypoint(on_host[in_file(name)]["entrypoint"]) is ALL[name].flow
    assert yaml.safe_load(FILE.read_text())["pull"] == []


@pytest.mark.parametrize("name", ALL)
def test_each_runs_on_the_queue_of_its_host(name: str, on_host: dict[str, Any]) -> None:
    """What spans the hosts has a queue of its own; a form with a wrong field is refused."""
    entry = on_host[in_file(name)]
    queue = "fleet" if name in FLEET else "a"
    assert entry["work_pool"] == {"name": "switchyard", "work_queue_name": queue}
    assert entry["enforce_parameter_schema"] is True


@pytest.mark.parametrize("name", ALL)
def test_tags_and_the_plan_are_the_offers(name: str, on_host: dict[str, Any]) -> None:
    entry = on_host[in_file(name)]
    fleet = ["fleet"] if name in FLEET else []
    assert set(entry["tags"]) == {"switchyard", *fleet, ALL[name].phase}
    assert entry.get("parameters", {}) == ({"plan": "/etc/plan.toml"} if ALL[name].needs_plan else {})


@pytest.mark.parametrize("name", OFFERS)
def test_it_runs_by_itself_as_often(name: str, on_host: dict[str, Any], served: dict[str, RunnerDeployment]) -> None:
    """And each schedule has a slug, by which a second deployment knows it."""
    entry = on_host[in_file(name)].get("schedules", [])
    assert [when(one.schedule) for one in served[name].schedules or []] == [
        (one.get("cron") or one["interval"], one["timezone"]) for one in entry
    ]
    assert [one["slug"] for one in entry] == [name for _ in entry]


@pytest.mark.parametrize("name", OFFERS)
def test_as_many_run_at_once(name: str, on_host: dict[str, Any], served: dict[str, RunnerDeployment]) -> None:
    entry, options = on_host[in_file(name)].get("concurrency_limit"), served[name].concurrency_options
    assert (entry or {}).get("limit") == served[name].concurrency_limit
    assert (entry or {}).get("collision_strategy") == (options.collision_strategy if options else None)


def test_one_rollout_at_a_time_and_a_way_back_at_any(on_host: dict[str, Any]) -> None:
    assert on_host["fleet"]["concurrency_limit"]["limit"] == 1
    assert "concurrency_limit" not in on_host["rollback-fleet"]


def test_a_soak_that_fails_rolls_back_its_own_host(on_host: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The trigger is the same one, but for the host that it listens to."""
    (entry,) = on_host["rollback-a"]["triggers"]
    monkeypatch.setenv("SWITCHYARD_HOST", "a")
    made = rollback_trigger()
    assert set(entry["expect"]) == set(made.expect)
    assert entry["match"] == made.match.model_dump()
    assert entry["parameters"] == made.parameters


def test_without_a_plan_the_one_served_last_is_meant() -> None:
    """An empty field says so."""
    assert declared(SWITCHYARD_HOST="a")["migrate-a"]["parameters"] == {"plan": ""}


def when(schedule: Any) -> tuple[str | int, str | None]:
    if isinstance(schedule, CronSchedule):
        return schedule.cron, schedule.timezone
    assert isinstance(schedule, IntervalSchedule)
    return int(schedule.interval.total_seconds()), schedule.timezone


@pytest.mark.parametrize("name", ALL)
def test_its_version_is_the_programs(name: str, on_host: dict[str, Any], served: dict[str, RunnerDeployment]) -> None:
    """Not a hash of a file, nor a commit of the folder in which it is deployed."""
    versions = {on_host[in_file(name)]["version"], ALL[name].flow.version}
    versions |= {served[name].version} if name in served else set()
    assert versions == {program_version()}
