"""Orders between a command and a yard of different versions: carried out, or one line that says to restart the yard."""

import contextlib
import json
import socketserver
import subprocess
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import httpx
import pytest
from pydantic import create_model
from switchyard_command import command

from engines.errors import SwitchyardError
from engines.yard import orders
from engines.yard.client import YardClient, short_name, socket_path
from engines.yard.ports.control import listening

RECORDED = json.loads((Path(__file__).parents[3] / "homes" / "268cc56" / "control.json").read_text())
LATER = 1_000_000


class OldYard(BaseHTTPRequestHandler):
    """The control socket of 268cc56: what it answered to each order, and 404 to those it did not have."""

    protocol_version = "HTTP/1.1"
    taken: list[tuple[str, dict]]

    def do_GET(self):
        self._answer(200, json.dumps(RECORDED["status"]).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        name = self.path.strip("/")
        if name not in RECORDED["orders"]:
            self._answer(404, b"404: Not Found")
            return
        self.taken.append((name, body))
        self._answer(200, b"".join(json.dumps(line).encode() + b"\n" for line in RECORDED["orders"][name]))

    def _answer(self, code, body):
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self):
        return "a command"

    def log_message(self, *_):
        pass


class Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


@pytest.fixture
def old(tmp_path):
    """A home in which a yard of 268cc56 runs, as far as its control socket shows; the orders that reached it."""
    home = tmp_path / "home"
    socket_path(home).parent.mkdir(parents=True)
    handler = type("Handler", (OldYard,), {"taken": []})
    server = Server("unused", handler, bind_and_activate=False)
    server.socket.close()
    server.socket = listening(socket_path(home))
    server.socket.setblocking(True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield home, handler.taken
    server.shutdown()
    server.server_close()


def switchyard(home, *arguments):
    env = {"SWITCHYARD_HOME": str(home), "PATH": "/usr/bin:/bin", "COLUMNS": "200", "HOME": str(home)}
    return subprocess.run(
        command(*arguments), env=env, cwd=home, text=True, capture_output=True, timeout=60, check=False
    )


@contextlib.contextmanager
def posting(home):
    with short_name(socket_path(home)) as name:
        transport = httpx.HTTPTransport(uds=name, verify=False)
        with httpx.Client(transport=transport, base_url="http://yard", timeout=30) as http:
            yield http


ORDERS = {
    "promote": ["smollm2", "--to", "mistral.rs", "--yes"],
    "canary": ["smollm2", "--weight", "0.5", "--yes"],
    "shadow": ["smollm2", "--share", "0.5"],
    "use": ["auto"],
    "drain": [],
    "load": [],
    "unload": [],
    "reload": [],
    "stop": [],
}


@pytest.mark.parametrize("name", ORDERS)
def test_an_old_yard_carries_out_what_it_knows(old, name):
    home, taken = old
    done = switchyard(home, name, *ORDERS[name])
    assert (done.returncode, done.stdout.strip()) == (0, RECORDED["orders"][name][-1]["done"]), done.stderr
    assert [order for order, _ in taken] == [name]


def test_the_status_of_an_old_yard_is_shown(old):
    home, _ = old
    done = switchyard(home, "status")
    assert done.returncode == 0, done.stderr
    assert "smollm2 → llama.cpp" in done.stdout
    assert "Traceback" not in done.stderr


def test_an_order_that_an_old_yard_does_not_have_is_one_line_with_what_to_do(old, monkeypatch):
    home, taken = old
    monkeypatch.setitem(orders.ORDERS, "upgrade", orders.Order)
    with pytest.raises(
        SwitchyardError, match=r"older than this command.*`upgrade`.*restart it.*switchyard stop"
    ) as told:
        YardClient(home).order("upgrade", model="smollm2")
    assert "\n" not in str(told.value)
    assert taken == []


@pytest.mark.parametrize("newer", ["promote", "promote.slots"])
def test_a_newer_form_of_an_order_is_not_misread_by_an_old_yard(old, monkeypatch, newer):
    """268cc56 takes any field and leaves out what it does not know: it must not get the order at all."""
    home, taken = old
    monkeypatch.setitem(orders.SINCE, newer, LATER)
    newer_promote = create_model("PromoteOrder", __base__=orders.PromoteOrder, slots=(bool, False))
    monkeypatch.setitem(orders.ORDERS, "promote", newer_promote)
    with pytest.raises(SwitchyardError, match="older than this command"):
        YardClient(home).order("promote", model="smollm2", slots=True)
    assert taken == []
    if newer != "promote":
        assert YardClient(home).order("promote", model="smollm2")


def test_a_yard_refuses_what_needs_a_newer_one_and_takes_orders_without_a_version(start_yard):
    """As commands of 268cc56 send them; `orders` in its status says how new it is."""
    yard = start_yard().ready()
    with posting(yard.home) as http:
        refused = http.post("/promote", json={"model": "m", "to": "new", "version": LATER}).json()
        assert "older than this command" in refused["error"]
        assert yard.orders.status()["models"][0]["serving"] == "old"
        done = http.post("/promote", json={"model": "m", "to": "new"}).text.splitlines()[-1]
        assert json.loads(done) == {"done": "m is served by new"}
        assert http.get("/status").json()["orders"] == orders.VERSION


def test_a_command_of_268cc56_finds_all_it_reads_in_the_status(start_yard):
    """What was in the status of a model, an engine and the yard then is still there."""
    told, before = start_yard().ready().orders.status(), RECORDED["status"]
    assert before.keys() <= told.keys()
    model, old_model = told["models"][0], before["models"][0]
    assert old_model.keys() <= model.keys()
    assert old_model["engines"][0].keys() <= model["engines"][0].keys()
