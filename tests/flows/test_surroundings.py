"""A command called from somebody else's project, behind a proxy, with secrets around it, works all the same."""

import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import installed
import psutil
import pytest
from hostile import hostile_folder, imported
from real_yard import LOCAL, plan_text
from switchyard_command import json_of
from waiting import until

from engines.process.process import registered
from engines.process.serving import free_port
from engines.yard.client import YardClient
from engines.yard.engine.launch_spec import MODULES

NOWHERE = "http://127.0.0.1:9"
PROXIES = {
    "as curl wants it": {"http_proxy": NOWHERE, "https_proxy": NOWHERE},
    "in capitals": {"HTTP_PROXY": NOWHERE, "HTTPS_PROXY": NOWHERE, "NO_PROXY": "example.com"},
    "SOCKS for all": {"ALL_PROXY": "socks5://127.0.0.1:9", "all_proxy": "socks5h://127.0.0.1:9", "no_proxy": ""},
    "for nobody": {"HTTP_PROXY": "nonsense://x", "ALL_PROXY": NOWHERE, "NO_PROXY": "*"},
}
ALL_PROXIES = {name: value for some in PROXIES.values() for name, value in some.items()} | {"NO_PROXY": "example.com"}
CLIENTS_KEY = "the-key-of-the-clients"
SECRETS = {
    "NANOBOT_PASS_PHRASE": CLIENTS_KEY,
    "OPENAI_API_KEY": "sk-abcdefghijklmnopqrstuvwx",
    "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyzabcdefgh",
    "AWS_SECRET_ACCESS_KEY": "aws-secret-of-somebody",
    "DATABASE_URL": "postgresql://joe:hunter2-of-joe@db/x",
    "PREFECT_API_AUTH_STRING": "user:prefect-password",
    "NOTIFY_SOCKET": "/run/nowhere",
    "WATCHDOG_USEC": "1000",
}

# `evaluate` takes minutes: for the whole proof
DEPLOYMENTS = os.environ.get("SWITCHYARD_TEST_DEPLOYMENTS", "rollback").split(",")


@pytest.fixture
def folder(tmp_path):
    return hostile_folder(tmp_path / "their project")


@pytest.fixture
def run(environment, folder):
    """`switchyard ARG ...` as installed, called from the hostile folder."""

    def run(*arguments, timeout_s=300, cwd=folder, **variables):
        return subprocess.run(
            command(*arguments),
            env={**environment, **variables},
            cwd=cwd,
            text=True,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )

    return run


def command(*arguments):
    return [str(Path(sys.executable).with_name("switchyard")), *map(str, arguments)]


def small_plan(folder, port=8080, **options):
    path = folder.parent / "plan.toml"
    path.write_text(plan_text(port, **options))
    return path


@pytest.mark.engine
@pytest.mark.parametrize("path", [None, ":", ".:"], ids=["no PYTHONPATH", "an empty entry", "a relative entry"])
def test_nothing_of_the_callers_folder_is_imported(run, folder, path):
    """An empty or a relative entry comes behind our own: `json.py` would still be theirs."""
    installed.require(*installed.BOTH)
    plan, root = small_plan(folder), Path(__file__).parents[2]
    for name in ("sitecustomize", "usercustomize") if path else ():  # Python itself imports these
        (folder / f"{name}.py").unlink()
    variables = {} if path is None else {"PYTHONPATH": f"{root}{os.pathsep}{path}"}
    for arguments in (("doctor",), ("preflight", plan), ("status",), ("history",), ("restore", "llama.cpp")):
        done = run(*arguments, **variables)
        assert "of the caller" not in done.stdout + done.stderr, arguments
        expected = {"preflight": (0, 3, 4), "restore": (2,)}.get(arguments[0], (0,))  # nothing was retired
        assert done.returncode in expected, done.stderr
    assert imported(folder) == []


@pytest.mark.parametrize("path", [".", ":", "..:.", "their project:"])
def test_a_search_path_that_begins_with_the_callers_folder_is_not_followed(run, tmp_path, path):
    """Only what Python itself loads before the command begins (`json`, `sitecustomize`) cannot be kept out."""
    folder = hostile_folder(tmp_path / "their other project", modules=("typer", "rich", "gguf", "psutil"))
    for arguments in (("--help",), ("status",), ("history",)):
        done = run(*arguments, cwd=folder, PYTHONPATH=path)
        assert done.returncode == 0, done.stderr
    assert imported(folder) == []


@pytest.mark.engine
@pytest.mark.usefixtures("prefect_database")
@pytest.mark.parametrize("proxies", PROXIES.values(), ids=PROXIES)
def test_no_proxy_stands_between_us_and_loopback(run, folder, proxies):
    """Prefect's server of one command, and the flow that reports to it; the folder's own settings are another's."""
    installed.require(*installed.BOTH)
    done = run("soak", small_plan(folder), "--json", **proxies)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr
    assert json_of(done)["result"]
    assert imported(folder) == []


def test_a_prefect_elsewhere_is_reached_through_the_users_proxy(run, folder):
    asked = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(502)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        url = "http://prefect.example:4200/api"
        proxies = {"HTTP_PROXY": f"http://127.0.0.1:{proxy.server_port}", "PREFECT_API_URL": url}
        done = run("soak", small_plan(folder), **proxies)
        broken = run("soak", small_plan(folder), **{**proxies, "HTTP_PROXY": "socks5://127.0.0.1:9"})
        proxy.shutdown()
    assert asked == [f"{url}/health"]
    assert done.returncode == 5
    for said in (done.stderr, broken.stderr):
        assert "Traceback" not in said
        assert said.splitlines()[-1].startswith(f"error: PREFECT_API_URL is {url}"), said
    assert broken.returncode == 2


def seen_by(pid):
    """The environment with which a process and its descendants were started."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return [dict(process.environ()) for process in processes]


def assert_an_engine_may_see(environ):
    for name, value in SECRETS.items():
        assert name not in environ
        assert value not in environ.values()
    names = [name for name in environ if name.startswith(("SWITCHYARD_", "PREFECT_", "WATCHDOG_", "NOTIFY_"))]
    assert names in ([], ["SWITCHYARD_ENGINE_API_KEY"])
    assert environ["PYTHONSAFEPATH"] == "1"
    assert environ["PATH"]
    assert environ["MY_OWN_SETTING"] == "stays"


@pytest.mark.engine
def test_a_yard_serves_and_its_engines_see_no_secret(environment, folder, home):
    """The binary, the hosted form and the native worker, one after the other."""
    installed.require(*installed.BOTH)
    port = free_port()
    plan = small_plan(folder, port, parallel=1, context=512)
    plan.write_text(f'api_key_env = "NANOBOT_PASS_PHRASE"\n{plan.read_text()}')
    environment |= {**SECRETS, **ALL_PROXIES, "MY_OWN_SETTING": "stays"}
    log = folder.parent / "serve.log"
    with log.open("wb") as output:
        yard = subprocess.Popen(command("serve", plan), env=environment, cwd=folder, stdout=output, stderr=output)
    try:
        orders = YardClient(home)
        until(lambda: yard.poll() is not None or _health(port) == 200, "the yard to serve", 120)
        assert yard.poll() is None, log.read_text()
        for engine in ("llama.cpp", "mistral.rs", "mistral.rs-native"):
            if engine != "llama.cpp":
                orders.order("promote", to=engine)
            (route,) = orders.status()["models"]
            assert route["serving"] == engine, log.read_text()
            (serving,) = [one for one in route["engines"] if one["engine"] == engine]
            for environ in seen_by(serving["pid"]):
                assert_an_engine_may_see(environ)
            assert _asked(port, None) == 401
            assert _asked(port, CLIENTS_KEY) == 200
    finally:
        yard.terminate()
        yard.wait(60)
    assert imported(folder) == []


def _health(port):
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", **LOCAL).status_code
    except httpx.HTTPError:
        return 0


def _asked(port, key):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    return httpx.post(url, json=body, headers=headers, timeout=120, **LOCAL).status_code


@pytest.mark.engine
@pytest.mark.usefixtures("prefect_database")
def test_an_evaluation_from_there(environment, folder, home):
    """Both engines hosted in Python, the measuring client's self-test, Prefect: all of it, and no engine sees a key."""
    installed.require(*installed.BOTH)
    plan = small_plan(folder, parallel=1, context=512)
    text = plan.read_text().replace('form = "binary"', 'form = "hosted"')
    plan.write_text(f'api_key_env = "NANOBOT_PASS_PHRASE"\n{text}\n{QUICK}')
    environment |= {**SECRETS, **ALL_PROXIES, "MY_OWN_SETTING": "stays"}
    del environment["PREFECT_API_AUTH_STRING"]  # Prefect's own setting, and its server would ask for it
    log = folder.parent / "evaluate.log"
    with log.open("wb") as output:
        evaluating = subprocess.Popen(
            command("evaluate", plan, "--json"), env=environment, cwd=folder, stdout=output, stderr=output
        )
    seen = {}

    def look():
        for name, process in registered(home):
            try:
                if name != "prefect server" and set(MODULES.values()) & set(process.cmdline()):
                    seen[name] = process.environ()
            except psutil.Error:
                continue
        return evaluating.poll() is not None

    until(look, "the evaluation to end", 600)
    said = log.read_text()
    assert evaluating.returncode in (0, 3, 4), said
    assert "Traceback" not in said
    assert {name.split()[0] for name in seen} == {"llama.cpp", "mistral.rs"}
    for environ in seen.values():
        assert_an_engine_may_see(environ)
    assert imported(folder) == []


QUICK = """
[measure]
requests_per_block = 1
warmup_min = 0
warmup_max = 1
looks = [3]
calibration_blocks = 0
max_tokens = 4
parity_prompts = 1
parity_tokens = 4
soak_s = 2
every_behaviour = false
[client]
requires = ["chat_answer"]
[limits]
foreign_cpu = 1.0
"""


@pytest.mark.engine
@pytest.mark.usefixtures("prefect_database")
@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_up_from_there(environment, folder, home, deployment):
    """Prefect's server, its runner, the flow runs that the runner spawns and the yard: all of them are ours."""
    installed.require(*installed.BOTH)
    port, prefect = free_port(), free_port()
    plan = small_plan(folder, port, parallel=1, context=512, yard=QUICK)
    environment |= {**SECRETS, **ALL_PROXIES, "MY_OWN_SETTING": "stays"}
    del environment["PREFECT_API_AUTH_STRING"]
    log = folder.parent / "up.log"
    argv = command("up", plan, "--prefect-port", prefect, "--no-schedules")
    with log.open("wb") as output:
        up = subprocess.Popen(argv, env=environment, cwd=folder, stdout=output, stderr=output)
    try:
        until(lambda: "Ctrl-C" in log.read_text() or up.poll() is not None, "up", 240)
        assert up.poll() is None, log.read_text()
        with httpx.Client(base_url=f"http://127.0.0.1:{prefect}/api", timeout=60, **LOCAL) as api:
            asked = api.get(f"/deployments/name/{deployment}/{deployment}").raise_for_status().json()["id"]
            run = api.post(f"/deployments/{asked}/create_flow_run", json={}).raise_for_status().json()["id"]
            state = {}

            def ended():
                state.update(api.get(f"/flow_runs/{run}").raise_for_status().json()["state"])
                return state["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")

            until(ended, "the flow run", 600)
            lines = api.post("/logs/filter", json={"logs": {"flow_run_id": {"any_": [run]}}}).json()
        said = [line["message"] for line in lines]
        judged = state["name"] in ("FAIL", "INCONCLUSIVE", "ERROR")
        assert state["type"] == "COMPLETED" or judged or "verdict" in str(state), (state, said)
        assert state["type"] != "CRASHED", (state, said)
        assert _health(port) == 200
    finally:
        up.terminate()
        up.wait(120)
    assert imported(folder) == []
