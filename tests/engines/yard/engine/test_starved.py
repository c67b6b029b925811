"""Engines that are short of CPU, stopped, or asleep: only time in which they could have worked counts against them."""

import os
import signal
import time

from cgroups import short_of_cpu
from waiting import until


def test_a_prefill_on_a_tenth_of_a_cpu_is_not_a_hang(start_yard):
    """0.8 s of work without a word, limit 1 s: on a tenth of a CPU it takes 8 s."""
    yard = start_yard(parallel=1, settings={"wedged_after_s": 1}).ready()
    answers = []
    with short_of_cpu(yard.engine("old")["pid"], share=0.1):
        yard.ask(answers, fake_cpu_s=0.8).join(60)
        assert [answer.status_code for answer in answers] == [200]
        assert yard.engine("old")["restarts"] == 0
        assert yard.orders.status()["incidents"] == []


def test_a_hang_that_spins_is_found_although_it_is_short_of_cpu(start_yard):
    yard = start_yard(parallel=1, settings={"wedged_after_s": 1}).ready()
    answers = []
    with short_of_cpu(yard.engine("old")["pid"], share=0.5):
        thread = yard.ask(answers, fake_cpu_s=600)
        until(lambda: yard.engine("old")["restarts"] == 1, "the hang to be found")
    thread.join(60)
    assert any("no token, no prompt progress" in i["what"] for i in yard.orders.status()["incidents"])


def test_an_idle_engine_that_is_stopped_is_found_at_once(start_yard):
    """With the settings as they come: liveness probes an idle engine gets once a minute."""
    yard = start_yard().ready()
    os.kill(yard.engine("old")["pid"], signal.SIGSTOP)
    until(lambda: yard.engine("old")["restarts"] == 1, "a restart", deadline_s=20)
    until(lambda: yard.health() == 200, "the engine to be back")
    assert any("state T" in i["what"] for i in yard.orders.status()["incidents"])


def test_an_engine_that_is_stopped_while_it_loads_is_found_at_once(start_yard):
    yard = start_yard(old="--load-s 3")
    until(lambda: yard.health_or_none() is not None and yard.engine("old")["pid"], "the engine to load")
    os.kill(yard.engine("old")["pid"], signal.SIGSTOP)
    until(lambda: yard.engine("old")["restarts"] == 1, "a restart", deadline_s=15)
    yard.ready()


def test_a_yard_that_was_itself_stopped_blames_no_engine(start_yard):
    yard = start_yard(old="--itl-ms 20", parallel=1, settings={"wedged_after_s": 1}).ready()
    answers = []
    thread = yard.ask(answers, stream=True, max_tokens=400)
    until(lambda: yard.engine("old")["in_flight"] == 1, "a stream to begin")
    yard.process.send_signal(signal.SIGSTOP)
    time.sleep(4)  # four times as long as an engine may be silent
    yard.process.send_signal(signal.SIGCONT)
    thread.join(60)
    assert answers[0].text.count('" word"') == 400
    assert yard.engine("old")["restarts"] == 0


def test_the_liveness_probe_of_a_slow_engine_gets_the_time_that_its_token_takes(start_yard):
    """Its token takes 1.5 s at the start; a hang is 1 s of silence; an idle hour must not end in a restart."""
    yard = start_yard(old="--ttft-ms 1500", settings={"wedged_after_s": 1, "probe_every_s": 0.3, "failed_probes": 1})
    yard.ready()
    quiet_until = time.monotonic() + 6
    while time.monotonic() < quiet_until:
        assert yard.engine("old")["restarts"] == 0
        time.sleep(0.2)
    assert yard.orders.status()["incidents"] == []
