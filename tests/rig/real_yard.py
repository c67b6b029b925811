"""A yard over real engines, as `switchyard serve` starts it."""

import signal
import subprocess

import httpx
import installed
from switchyard_command import command
from waiting import until

from engines.process.serving import free_port
from engines.yard.client import YardClient

LOCAL = {"trust_env": False, "verify": False}  # certificates would take longer to load than the answer
HOSTED = 'engine = "mistral.rs"\nform = "hosted"'
HELLO = [{"role": "system", "content": "x"}, {"role": "user", "content": "Hello"}]  # its own system prompt is long


def plan_text(
    port,
    *,
    parallel=2,
    context=2048,
    settings="",
    model="",
    models="",
    yard="",
    incumbent="",
    head="",
    candidate=HOSTED,
):
    return f"""
name = "serve"
accepted_unsupported = ["seed", "prefix cache", "prefill_assistant", "parallel"]
{head}
[incumbent]
engine = "llama.cpp"
form = "binary"
{incumbent}
[candidate]
{candidate}
[settings]
context_tokens = {context}
parallel = {parallel}
threads = 1
{settings}
[[models]]
id = "smollm2"
gguf = "{installed.smollm2(installed.LLAMA_SERVER)}"
{model}
{models}
[yard]
port = {port}
{yard}
"""


class Yard:
    def __init__(self, environment, home, folder, **options):
        self.port, self.home = free_port(), home
        self.plan = folder / "plan.toml"
        self.plan.write_text(plan_text(self.port, **options))
        self.log = folder / "serve.log"
        self.orders = YardClient(home)
        self.start(environment)

    def start(self, environment):
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command("serve", self.plan),
                env=environment,
                cwd=self.plan.parent,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    def ready(self):
        until(lambda: self.process.poll() is not None or self.health() == 200, "the yard to serve", deadline_s=60)
        assert self.process.poll() is None, self.log.read_text()
        return self

    def health(self):
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/health", **LOCAL).status_code
        except httpx.HTTPError:
            return 0

    def engine(self, name):
        return next(e for e in self.orders.status()["models"][0]["engines"] if e["engine"] == name)

    def ask(self, timeout=300, **body):
        chat = {"messages": HELLO, "max_tokens": 4, **body}
        url = f"http://127.0.0.1:{self.port}/v1/chat/completions"
        return httpx.post(url, json=chat, timeout=timeout, **LOCAL)

    def long_stream(self, begins):
        """All bytes of a stream of minutes; `begins` is set with its first content."""
        chat = {"messages": HELLO, "max_tokens": 1500, "ignore_eos": True}
        url, read = f"http://127.0.0.1:{self.port}/v1/chat/completions", b""
        with httpx.stream("POST", url, json={**chat, "stream": True}, timeout=300, **LOCAL) as answer:
            for chunk in answer.iter_raw():
                read += chunk
                if read.count(b'"content":') > 3:
                    begins.set()
        return read

    def end(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(60)
