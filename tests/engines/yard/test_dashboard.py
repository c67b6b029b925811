"""The dashboard in docs/ asks for what the yard counts, and Prometheus, where it is installed, evaluates all of it."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
from waiting import until

from engines.process.serving import free_port

DASHBOARD = json.loads((Path(__file__).parents[3] / "docs" / "grafana.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
HOW = "needs Prometheus: apt-get install prometheus (Debian), which brings promtool"
# nothing of these happens to a yard that serves one request
QUIET = re.compile(r"vram|on_gpu|requests_lost|refused|not_passed|disconnects|shadow|overflow|fallback")


def test_every_name_in_it_is_one_of_the_yards(start_yard):
    yard = start_yard().ready()
    with yard.http() as http:
        metrics = http.get("/metrics").text
    names = set(re.findall(r"^# TYPE (\S+)", metrics, re.MULTILINE))
    used = {name for expression in EXPRESSIONS for name in re.findall(r"switchyard_\w+", expression)}
    assert {re.sub("_bucket$", "", name) for name in used} <= names
    assert not {name for name in names if not name.endswith("_created")} - {re.sub("_bucket$", "", n) for n in used}


@pytest.mark.skipif(shutil.which("promtool") is None, reason=HOW)
def test_promtool_has_nothing_to_say_against_the_metrics(start_yard):
    yard = start_yard().ready()
    yard.ask([]).join()
    with yard.http() as http:
        done = subprocess.run(
            ["promtool", "check", "metrics"], input=http.get("/metrics").text, capture_output=True, text=True
        )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("prometheus") is None, reason=HOW)
def test_prometheus_evaluates_each_expression(start_yard, tmp_path):
    yard = start_yard().ready()
    port = free_port()
    config = tmp_path / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 1s}\nscrape_configs:\n"
        f"  - job_name: yard\n    static_configs: [{{targets: ['127.0.0.1:{yard.port}']}}]\n"
    )
    argv = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen([*argv, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:

            def found(expression):
                text = expression.replace("$__rate_interval", "30s").replace("$model", ".*")
                answer = http.get("/api/v1/query", params={"query": text})
                assert answer.status_code == 200, (expression, answer.text)
                return answer.json()["data"]["result"]

            def up():
                try:
                    return http.get("/-/ready").status_code == 200 and bool(found("switchyard_waiting"))
                except httpx.HTTPError:
                    return False

            until(up, "a first scrape")

            def counted():
                yard.ask([], stream=True).join()  # a counter that begins with its first request has not grown yet
                return found("increase(switchyard_tokens_total[30s]) > 0")

            until(counted, "requests to be counted")
            empty = [one for one in EXPRESSIONS if not found(one) and not QUIET.search(one)]
        assert empty == []
    finally:
        server.terminate()
        server.wait(10)
