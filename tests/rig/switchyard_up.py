"""`switchyard up` on real engines and a small plan, in a home of its own."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
from processes import of_home
from real_yard import HELLO, LOCAL, plan_text
from switchyard_command import command, environment_of
from traffic import traffic
from waiting import until

from engines.home import host
from engines.model.digest import model_digest
from engines.process.process import registered
from engines.process.serving import free_port
from engines.registry import driver
from engines.yard.client import YardClient
from migrations.plan import content_hash
from migrations.plan_file import load_plan
from tasks.records.store import Records, open_records
from tasks.verdicts.verdict import CheckResult, Verdict

OLD, NEW, MODEL = "llama.cpp", "mistral.rs", "smollm2"
MIGRATE = '[migrate]\napprove = "auto"\nphases = ["subprocess"]\n[limits]\nrecover_s = 60\nkill_detect_s = 60'
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
LONG_S = 240


class Up:
    """A home with a small plan, and `switchyard up` on it."""

    def __init__(self, folder: Path, parts: str = MIGRATE) -> None:
        self.home, self.log = folder / "home", folder / "up.log"
        self.port, self.prefect = free_port(), free_port()
        self.plan = folder / "plan.toml"
        self.plan.write_text(plan_text(self.port, context=512, models=parts))
        self.environment = environment_of(self.home)
        self.yard = YardClient(self.home)
        self.lost: list[str] = []  # requests of clients without a whole answer: when, which, why
        self.process: subprocess.Popen[bytes] | None = None

    # it and its parts

    @property
    def up(self) -> subprocess.Popen[bytes]:
        assert self.process is not None
        return self.process

    def argv(self) -> list[str]:
        return command("up", self.plan, "--prefect-port", self.prefect, "--no-schedules")

    def ensure(self) -> None:
        """It is up, started now where it was not."""
        if self.process is None or self.process.poll() is not None:
            self.start()
            until(lambda: "Ctrl-C" in self.said() or self.up.poll() is not None, "up", LONG_S)
        assert self.up.poll() is None, self.said()

    def start(self) -> None:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.argv(), env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def said(self) -> str:
        return self.log.read_text()

    def part(self, name: str) -> psutil.Process | None:
        return dict(registered(self.home)).get(name)

    def kill(self, name: str) -> None:
        """SIGKILL of a part, once it runs."""
        until(lambda: self.part(name), name)
        part = self.part(name)
        assert part is not None
        part.kill()

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*arguments), env=self.environment, text=True, capture_output=True, timeout=LONG_S, check=False
        )

    def refused(self) -> subprocess.CompletedProcess[str]:
        """`switchyard up` while another program has Prefect's port."""
        with socket.socket() as holder:
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(("127.0.0.1", self.prefect))
            holder.listen()
            return self.run(*self.argv()[3:])

    def end(self) -> None:
        """Whatever a test left: nothing runs any more."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            self.process.wait(LONG_S)
        for process in of_home(self.home):
            with contextlib.suppress(psutil.Error):
                process.kill()

    # the yard

    def route(self) -> dict[str, Any]:
        return self.yard.status()["models"][0]

    def serve_with(self, engine: str) -> None:
        """The model is committed to `engine`, moved there where it is not."""
        if self.route()["committed"] != engine:
            self.yard.order("promote" if engine == NEW else "rollback", model=MODEL, to=engine)
        assert self.route()["serving"] == engine

    def ask(self, number: int = 0) -> int:
        """The HTTP status of a streamed answer in a conversation of its own; 0 for none, and for one cut short."""
        messages = [HELLO[0], {"role": "user", "content": f"Count from {number}."}]
        body = {"model": MODEL, "messages": messages, "max_tokens": 3, "stream": True}
        try:
            url = f"http://127.0.0.1:{self.port}/v1/chat/completions"
            answer = httpx.post(url, json=body, timeout=60, **LOCAL)
        except httpx.HTTPError as error:
            self.lost.append(f"{datetime.now():%H:%M:%S} {number}: {error!r}")
            return 0
        whole = '"error"' not in answer.text and answer.text.endswith("data: [DONE]\n\n")
        if whole and answer.status_code == 200:
            return 200
        self.lost.append(f"{datetime.now():%H:%M:%S} {number}: {answer.status_code} {answer.text[-400:]}")
        return answer.status_code if answer.status_code != 200 else 0

    def traffic(self) -> contextlib.AbstractContextManager[list[int]]:
        """A client's requests all the while, one after the other; the HTTP statuses (0: no answer)."""
        return traffic(self.ask, 0.5)

    # Prefect

    def api(self, path: str, body: Any = None) -> Any:
        """Prefect's answer; asked again, as its own client does, while its database is busy (503)."""
        answer = httpx.Response(503)

        def answered() -> bool:
            nonlocal answer
            answer = http.get(f"/api/{path}") if body is None else http.post(f"/api/{path}", json=body)
            return answer.status_code != httpx.codes.SERVICE_UNAVAILABLE

        with httpx.Client(base_url=f"http://127.0.0.1:{self.prefect}", timeout=60, **LOCAL) as http:
            until(answered, f"Prefect's database, for {path}")
        return answer.raise_for_status().json() if answer.content else None

    def begin(self, name: str, **parameters: Any) -> str:
        """The id of a new flow run of this deployment."""
        deployment = self.api(f"deployments/name/{name}/{name}")["id"]
        return str(self.api(f"deployments/{deployment}/create_flow_run", {"parameters": parameters})["id"])

    def ended(self, flow_run: str) -> dict[str, Any]:
        """The state in which a flow run has ended."""
        until(lambda: self.state(flow_run)["type"] in ENDED, "the end of a flow run", LONG_S)
        return self.state(flow_run)

    def state(self, flow_run: str) -> dict[str, Any]:
        time.sleep(0.3)  # each look costs the server 15 ms
        return self.api(f"flow_runs/{flow_run}")["state"]

    def runs_of(self, name: str) -> list[dict[str, Any]]:
        """The ended flow runs of a deployment, oldest first."""
        asked = {"deployments": {"name": {"any_": [name]}}, "sort": "EXPECTED_START_TIME_ASC"}
        return [run for run in self.api("flow_runs/filter", asked) if run["state_type"] in ENDED]

    def events(self, name: str) -> list[dict[str, Any]]:
        return self.api("events/filter", {"filter": {"event": {"name": [name]}}})["events"]

    def breach(self, engine: str) -> None:
        """A soak's event: it failed on `engine`."""
        event = {
            "id": str(uuid.uuid4()),
            "occurred": datetime.now(UTC).isoformat(),
            "event": "switchyard.soak.breached",
            "resource": {"prefect.resource.id": f"switchyard.model.{MODEL}", "switchyard.host": host()},
            "payload": {"model": MODEL, "engine": engine, "run_id": "r", "why": 'soak.failures: 9 "cut" answers'},
        }
        self.api("events", [event])

    # the records

    @contextlib.contextmanager
    def records(self) -> Iterator[Records]:
        with open_records(self.home / "switchyard.db") as opened:
            yield opened

    def evaluated(self) -> None:
        """On record: phase 1 has opened the model's gate."""
        plan, version = load_plan(self.plan), driver(NEW).find("hosted", None).version
        with self.records() as records:
            run = records.start_run("evaluate", plan.name, plan.model_dump(mode="json"))
            under = {
                "plan_hash": content_hash(plan),
                "model_digest": model_digest(plan.models[0].gguf),
                "engines": [{"arm": "candidate", "version": version}],
            }
            records.put_evidence(run.id, MODEL, "both", "performance", {}, environment=under)
            records.put_checks(run.id, MODEL, [CheckResult(check="parity.x", verdict=Verdict.PASS, why="seen")])
            records.finish_run(run.id, "done", verdict=Verdict.PASS)

    def steps(self, kind: str) -> dict[str, str]:
        """How far each step of the latest run of a kind is."""
        with self.records() as records:
            runs = records.history(1, kind=kind)
            return {step.step: step.state for step in records.steps(runs[0].id)} if runs else {}
