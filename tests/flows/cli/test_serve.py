"""`switchyard serve` on both real engines: moves under load, engines killed or hung, cycles that leak nothing."""

import asyncio
import concurrent.futures
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import httpx
import installed
import openai
import psutil
import pytest
from processes import of_home
from real_yard import HELLO, Yard
from switchyard_command import json_of
from waiting import until

from migrations.demo import gemma3
from tasks.verdicts.statistics import theil_sen

pytestmark = pytest.mark.engine

installed.require(*installed.BOTH)

FEW = 3
STREAMS = int(os.environ.get("SWITCHYARD_TEST_STREAMS", FEW))  # 64 for the whole proof
WORDS = int(os.environ.get("SWITCHYARD_TEST_PROMPT_WORDS", "250"))  # 1500 for a prompt of more than a minute
CYCLES = int(os.environ.get("SWITCHYARD_TEST_CYCLES", "2"))  # 200 for the whole proof
REQUESTS = int(os.environ.get("SWITCHYARD_TEST_REQUESTS", "10"))  # 500 for the whole proof
STALL_S = float(os.environ.get("SWITCHYARD_TEST_STALL_S", "12"))  # 150 for the whole proof
NATIVE = "mistral.rs-native"
LOADS = int(os.environ.get("SWITCHYARD_TEST_LOADS", "2"))  # of each of two models; 25 for the whole proof
LEAK_BYTES_PER_CYCLE = 100_000


@pytest.fixture
def start(environment, home, tmp_path):
    yards = []

    def start(**options):
        yards.append(Yard(environment, home, tmp_path, **options))
        return yards[-1].ready()

    yield start
    for yard in yards:
        yard.end()
        assert of_home(home) == []


class Streams:
    """STREAMS conversations at once from the OpenAI client, again and again until the block ends."""

    def __init__(self, yard):
        self.answers, self.broken = 0, []
        self._yard, self._stop = yard, threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self):
        self._thread.start()
        until(lambda: self.answers >= 2, "the load to run", deadline_s=120)
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join(600)
        assert not self._thread.is_alive()

    async def _run(self):
        url = f"http://127.0.0.1:{self._yard.port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as client:
            await asyncio.gather(*(self._converse(client, number) for number in range(STREAMS)))

    async def _converse(self, client, number):
        while not self._stop.is_set():
            said, finish = "", None
            try:
                stream = await client.chat.completions.create(
                    model="local-model",
                    messages=[HELLO[0], {"role": "user", "content": f"{number}: say hello"}],
                    max_tokens=4,
                    stream=True,
                )
                async for chunk in stream:
                    for choice in chunk.choices:
                        said += choice.delta.content or ""
                        finish = choice.finish_reason or finish
            except Exception as error:
                self.broken.append(repr(error))
                return
            if not said or finish not in ("stop", "length"):
                self.broken.append((said, finish))
            self.answers += 1

    def go_on(self, more):
        before = self.answers
        until(lambda: self.answers >= before + more or self.broken, "the load to go on", deadline_s=300)


def test_every_move_under_load_fails_nothing(start):
    """0 failed, 0 cut, every answer complete; test_clients has the promote and the rollback of the short version."""
    moves = [("canary", {"weight": 0.3}), ("rollback", {})]
    if STREAMS > FEW:
        moves += [("promote", {"form": "side-by-side"}), ("rollback", {"form": "side-by-side"})]
        moves += [("promote", {"form": "one-at-a-time"}), ("rollback", {"form": "one-at-a-time"})]
    yard = start()
    with Streams(yard) as load:
        for order, body in moves:
            yard.orders.order(order, **body)
            load.go_on(2)
    assert load.broken == []
    assert load.answers >= 2 * len(moves)
    requests = [i for i in yard.orders.status()["incidents"] if "request" in i["what"]]
    assert requests == []


def test_sampling_flags_of_the_incumbent_hold_for_both_engines(start):
    """A request that says nothing of sampling gets what the incumbent's command says, whoever serves."""
    flags = ["--temp", "0", "--repeat-penalty", "3.0", "--top-k", "5"]
    yard = start(incumbent=f"args = {json.dumps(flags)}").ready()
    asked = {"max_tokens": 24, "messages": [{"role": "user", "content": "Name three colours, then name them again."}]}

    def text(**fields):
        return yard.ask(**asked, **fields).json()["choices"][0]["message"]["content"]

    said = {"temperature": 0, "repeat_penalty": 3.0, "top_k": 5}
    assert text() == text() == text(**said)
    assert text() != text(repeat_penalty=1.0)
    yard.orders.order("promote")
    assert text() == text() == text(**said)
    assert text() != text(repeat_penalty=1.0)


@pytest.mark.parametrize(
    ("engine", "number"),
    [("llama.cpp", signal.SIGKILL), ("llama.cpp", signal.SIGSTOP)],  # phase 2's test kills mistral.rs
    ids=["killed", "hangs"],
)
def test_an_engine_that_goes_away_is_replaced(start, engine, number):
    yard = start(parallel=1, yard="wedged_after_s = 3")
    if engine == "mistral.rs":
        yard.orders.order("promote")
    first = yard.engine(engine)["pid"]
    asked = []
    asking = threading.Thread(target=lambda: asked.append(yard.ask(max_tokens=1500, stream=True)))
    asking.start()
    until(lambda: yard.engine(engine)["in_flight"] == 1, "a stream on the engine")
    os.kill(first, number)
    asking.join(300)
    assert asked[0].status_code == 200
    until(lambda: yard.health() == 200, "the engine to be back", deadline_s=60)
    assert yard.engine(engine)["pid"] not in (first, None)
    assert yard.ask().status_code == 200


def test_a_minute_of_prompt_is_no_reason_to_restart(start):
    """One slot, the watchdog at its quickest, and a prompt that fills the context: 0 restarts."""
    yard = start(parallel=1, context=8192, settings="batch_tokens = 64", yard="wedged_after_s = 1")
    words = " ".join(f"word{number}" for number in range(WORDS))
    began = time.monotonic()
    answer = yard.ask(messages=[{"role": "user", "content": words}], max_tokens=1)
    took = time.monotonic() - began
    assert answer.status_code == 200, answer.text
    assert yard.engine("llama.cpp")["restarts"] == 0, f"restarted during a prompt of {took:.0f} s"
    assert yard.orders.status()["incidents"] == []


def test_a_client_that_reads_nothing_costs_the_others_nothing(start):
    """A long stream with log-probabilities is not read; a second client asks beside it, and then none does."""
    yard = start(context=8192, yard="wedged_after_s = 3\nclient_stall_s = 120")
    body = {"messages": HELLO, "max_tokens": 6000, "ignore_eos": True, "stream": True}
    data = json.dumps({**body, "logprobs": True, "top_logprobs": 20}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        connection.connect(("127.0.0.1", yard.port))
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data) + data
        )
        half = time.monotonic() + STALL_S / 2
        while time.monotonic() < half:
            assert yard.ask().status_code == 200
        quiet = time.monotonic() + STALL_S / 2
        while time.monotonic() < quiet:
            assert yard.health() == 200
            time.sleep(0.5)
    assert (yard.engine("llama.cpp")["restarts"], yard.orders.status()["incidents"]) == (0, [])
    assert yard.ask().status_code == 200


def crash(pid):
    """Until it is gone: Rust's handler, which looks for stack overflows, lets the first signal pass."""

    def gone():
        try:
            os.kill(pid, signal.SIGSEGV)
        except ProcessLookupError:
            return True
        return False

    until(gone, "the worker to crash")


def test_a_native_crash_loses_what_was_under_way_and_nothing_else(start):
    """SIGSEGV in the worker: a begun stream ends with an error, who waits is served, and past its restarts the
    subprocess serves."""
    yard = start(parallel=1, yard="restarts = 1")
    yard.orders.order("promote", model="smollm2", to=NATIVE)
    assert yard.ask().status_code == 200
    for heir in (NATIVE, "mistral.rs"):
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            begins = threading.Event()
            begun = pool.submit(yard.long_stream, begins)
            assert begins.wait(60), "no token of the stream came"
            waiting = [pool.submit(yard.ask), pool.submit(yard.ask, stream=True)]
            crash(yard.engine(NATIVE)["pid"])
            assert b"went away" in begun.result()
            for asked in waiting:
                assert asked.result().status_code == 200
                assert b'"error"' not in asked.result().content
        assert yard.orders.status()["models"][0]["serving"] == heir
    incidents = " ".join(incident["what"] for incident in yard.orders.status()["incidents"])
    assert "signal SIGSEGV" in incidents
    assert "fallback to mistral.rs" in incidents


def test_many_requests_natively_are_all_right(start):
    """Mixed lengths, streamed and not, eight at a time, every tenth given up: the texts are the subprocess's own."""
    yard = start(parallel=1)
    bodies = [
        {"messages": [HELLO[0], {"role": "user", "content": f"Count from {n}" + " and on" * n}], "max_tokens": 2 + n}
        for n in range(5)
    ]

    def text(body, stream):
        answer = yard.ask(**body, temperature=0, stream=stream)
        assert answer.status_code == 200, answer.text
        if not stream:
            return answer.json()["choices"][0]["message"]["content"]
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])

    def one(number):
        body, stream = bodies[number % len(bodies)], number % 2 == 0
        if number % 10 == 9:
            with pytest.raises(httpx.TimeoutException):
                yard.ask(**body, temperature=0, timeout=0.05)
            return None
        return text(body, stream) == right[number % len(bodies)]

    yard.orders.order("promote", model="smollm2", to="mistral.rs")
    right = [text(body, False) for body in bodies]
    yard.orders.order("promote", model="smollm2", to=NATIVE)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(one, range(REQUESTS)))
    assert answers.count(False) == 0
    assert answers.count(True) == REQUESTS - REQUESTS // 10
    assert yard.engine(NATIVE)["restarts"] == 0
    assert "Already borrowed" not in Path(yard.engine(NATIVE)["log"]).read_text()


def test_two_models_natively_take_turns_in_the_room_of_one(start, home):
    """Each request loads its model and unloads the other: the budget holds, and the yard does not grow."""
    gemma, budget = gemma3(home), 1400  # MiB: Gemma takes 1200, SmolLM2 250
    how = f'engine = "{NATIVE}"\nload = "demand"'
    other = f'''[[models]]
id = "gemma"
gguf = "{gemma.gguf}"
{how}
[models.settings]
chat_template = "{gemma.settings.chat_template}"'''
    yard = start(model=how, models=other, yard=f"memory_budget_mib = {budget}")
    own, memory, held = psutil.Process(yard.process.pid), [], []
    for number in range(2 * LOADS - 1):
        name = ("smollm2", "gemma")[number % 2]
        answer = yard.ask(model=name, max_tokens=1)
        assert answer.status_code == 200, answer.text
        models = yard.orders.status()["models"]
        assert [model["id"] for model in models if not model["dormant"]] in ([name], ["smollm2", "gemma"])
        memory.append((number, own.memory_info().rss))
        held.append(sum(engine["memory_bytes"] or 0 for model in models for engine in model["engines"]))
    assert max(held[2:]) < budget * 2**20  # the first of each is loaded before anybody knows what it takes
    assert yard.log.read_text().count("needs the room") >= 2 * LOADS - 3
    if LOADS >= 25:
        slope = theil_sen([x for x, _ in memory[10:]], [y for _, y in memory[10:]])
        assert slope.low < LEAK_BYTES_PER_CYCLE, f"{slope.estimate / 1e3:.0f} kB a load"


def test_cycles_of_promote_and_rollback_leak_nothing(start, switchyard):
    yard = start(parallel=1)
    own = psutil.Process(yard.process.pid)
    memory, descriptors = [], []
    for number in range(CYCLES):
        yard.orders.order("promote")
        assert yard.ask(max_tokens=1).status_code == 200
        yard.orders.order("rollback")
        assert yard.ask(max_tokens=1).status_code == 200
        memory.append((number, own.memory_info().rss))
        descriptors.append(own.num_fds())
        assert len(of_home(yard.home)) == 2, "the yard and one engine"
    assert descriptors[-1] <= descriptors[0] + 2
    assert own.num_threads() < 80
    if CYCLES >= 50:  # fewer say nothing: the first ones fill caches
        settled = memory[len(memory) // 4 :]
        slope = theil_sen([x for x, _ in settled], [y for _, y in settled]).estimate
        assert slope < LEAK_BYTES_PER_CYCLE, f"{slope:.0f} bytes a cycle"
    assert json_of(switchyard("status", "--json"))["yard"]["models"][0]["serving"] == "llama.cpp"
