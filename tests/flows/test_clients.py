"""Clients that were set up for llama.cpp on its port work unchanged before, during and after a migration."""

import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import httpx
import installed
import pytest
from gguf_files import write_f16
from switchyard_command import command
from waiting import until

from engines.process.serving import free_port
from engines.yard.client import YardClient

pytestmark = pytest.mark.engine

installed.require(*installed.BOTH, "openai")

LOAD_S = 120
TURN_S = 1800  # nanobot's prompt has some 2000 tokens; on a busy CPU its reading may take minutes
CLIENTS = Path(__file__).parents[2] / ".venv-clients" / "bin"  # `make clients`


class Yard:
    """`switchyard serve` in front of llama.cpp and mistral.rs."""

    def __init__(self, port, home, process):
        self.url = f"http://127.0.0.1:{port}/v1"
        self.client = YardClient(home)
        self.process = process

    def serves(self):
        try:
            return httpx.get(self.url + "/health", trust_env=False, verify=False).status_code == 200
        except httpx.HTTPError:
            return False

    def in_flight(self):
        return sum(engine["in_flight"] for engine in self.client.status()["models"][0]["engines"])

    def engines_seen(self):
        return {sample["engine"] for sample in self.client.samples() if sample["ok"]}


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """SmolLM2 in F16: at Q4_1 mistral.rs reads nanobot's prompt for minutes."""
    return write_f16(tmp_path_factory.mktemp("models") / "smollm2-f16.gguf", installed.smollm2())


@pytest.fixture
def yard(environment, home, tmp_path, gguf):
    port, plan, log = free_port(), tmp_path / "switchyard.toml", tmp_path / "serve.log"
    plan.write_text(
        '[incumbent]\nengine = "llama.cpp"\n[candidate]\nengine = "mistral.rs"\n'
        "[settings]\ncontext_tokens = 8192\nparallel = 1\nthreads = 1\n"
        f'[[models]]\nid = "smollm2"\ngguf = "{gguf}"\n'
        f"[yard]\nport = {port}\n"
    )
    with log.open("wb") as output:
        process = subprocess.Popen(command("serve", plan), env=environment, stdout=output, stderr=subprocess.STDOUT)
    yard = Yard(port, home, process)
    until(lambda: process.poll() is not None or yard.serves(), "a yard that serves", LOAD_S)
    assert process.poll() is None, log.read_text()
    yield yard
    process.terminate()
    assert process.wait(60) == 0, log.read_text()


class Talk:
    """The OpenAI SDK, asking without a pause: streams and whole answers in turn, on a thread of its own."""

    def __init__(self, url):
        from openai import OpenAI

        self._sdk = OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
        self.answers, self.failures = [], []
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        assert [model.id for model in self._sdk.models.list()] == ["smollm2"]
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._enough.set()
        self._thread.join(600)

    def more(self, n=2):
        """Return when `n` more answers have come."""
        wanted = len(self.answers) + n
        until(lambda: len(self.answers) >= wanted or self.failures, f"{n} more answers", 600)

    def _run(self):
        while not self._enough.is_set():
            try:
                self.answers.append(self._streamed() if len(self.answers) % 2 else self._whole())
            except Exception as error:
                self.failures.append(repr(error))
                return

    def _asked(self, **more):
        asked = f"Question {len(self.answers)}: what is a switchyard?"
        question = [{"role": "system", "content": "x"}, {"role": "user", "content": asked}]
        return self._sdk.chat.completions.create(model="smollm2", messages=question, max_tokens=6, **more)

    def _whole(self):
        answer = self._asked()
        return answer.choices[0].message.content, answer.choices[0].finish_reason, answer.usage.completion_tokens

    def _streamed(self):
        text, finish, tokens = "", None, None
        for chunk in self._asked(stream=True, stream_options={"include_usage": True}):
            for choice in chunk.choices:
                text, finish = text + (choice.delta.content or ""), choice.finish_reason or finish
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        return text, finish, tokens


def test_the_openai_sdk_notices_nothing_of_a_promote_and_a_rollback(yard):
    with Talk(yard.url) as talk:
        talk.more()
        yard.client.order("promote")
        talk.more()
        yard.client.order("rollback", form="one-at-a-time")
        talk.more()
    assert talk.failures == []
    for text, finish, tokens in talk.answers:
        assert text
        assert finish in ("length", "stop")
        assert 1 <= tokens <= 6
    assert yard.engines_seen() == {"llama.cpp", "mistral.rs"}


def client_program(name):
    """A client's program, out of an environment of its own; skips where there is none."""
    program = shutil.which(name, path=f"{CLIENTS}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip(f"needs {name}: `make clients` installs it")
    return program


@pytest.fixture
def nanobot(yard, tmp_path):
    """One turn of the agent: its process, started."""
    program = client_program("nanobot")
    config = tmp_path / "nanobot.json"
    agent = {"workspace": str(tmp_path / "workspace"), "provider": "vllm", "model": "smollm2", "maxTokens": 256}
    # its own estimate counts tool definitions, which this model's template leaves out
    agent |= {"contextWindowTokens": 131_072, "maxToolIterations": 1, "temperature": 0.0}
    provider = {"vllm": {"apiKey": "none", "apiBase": yard.url}}
    config.write_text(json.dumps({"providers": provider, "agents": {"defaults": agent}}))
    environment = {**os.environ, "HOME": str(tmp_path)}
    # for the CPU's sake: its streams may be silent for 90 s, and the prompt takes longer
    environment |= {"NANOBOT_STREAM_IDLE_TIMEOUT_S": str(TURN_S), "NANOBOT_OPENAI_COMPAT_TIMEOUT_S": str(TURN_S)}

    def turn(session):
        argv = [program, "agent", "-c", config, "--no-markdown", "-s", session, "-m", "Say hello."]
        return subprocess.Popen(argv, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    return turn


def reply_of(turn):
    """What the agent said."""
    said, _ = turn.communicate(timeout=TURN_S)
    assert turn.returncode == 0, said
    reply = said.rpartition("nanobot\n")[2].strip()
    assert reply, said
    assert not reply.startswith("Error"), said
    return reply


def test_llm_notices_nothing_of_a_promote(yard, tmp_path):
    """Simon Willison's command, which streams: the same command line on llama.cpp and on mistral.rs."""
    program, home = client_program("llm"), tmp_path / "llm"
    home.mkdir()
    (home / "extra-openai-models.yaml").write_text(
        f"- model_id: mine\n  model_name: smollm2\n  api_base: {yard.url}\n  api_key_name: none\n"
    )
    (home / "keys.json").write_text('{"none": "none"}')
    environment = {**os.environ, "LLM_USER_PATH": str(home), "HOME": str(tmp_path)}

    def said():
        argv = [program, "-m", "mine", "-o", "max_tokens", "8", "Say hello."]
        done = subprocess.run(argv, env=environment, text=True, capture_output=True, timeout=TURN_S, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert said()
    yard.client.order("promote")
    assert said()
    # a client may be gone before the yard has noted its request
    until(lambda: yard.engines_seen() == {"llama.cpp", "mistral.rs"}, "a request answered by each engine", 10)
    assert all(sample["ok"] for sample in yard.client.samples())


def test_nanobot_takes_its_turns_before_during_and_after_a_promote(yard, nanobot):
    """One turn on llama.cpp, one that is under way when the promote is ordered, one on mistral.rs."""
    reply_of(nanobot("before"))
    turn = nanobot("during")
    until(lambda: yard.in_flight() or turn.poll() is not None, "the turn's request in flight", 60)
    yard.client.order("promote")
    reply_of(turn)
    reply_of(nanobot("after"))
    assert yard.engines_seen() == {"llama.cpp", "mistral.rs"}
    assert all(sample["ok"] for sample in yard.client.samples())
