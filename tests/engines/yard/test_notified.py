"""People are notified of what a yard does by itself, and of a way back that was taken."""

import json
import os
import signal
import sys

from waiting import until


def test_a_fallback_and_a_rollback_are_sent(start_yard, tmp_path):
    sent, program = tmp_path / "sent", tmp_path / "program.py"
    program.write_text("import sys\nopen(sys.argv[1], 'a').write(sys.stdin.read() + '\\n')\n")
    command = [sys.executable, "-I", str(program), str(sent)]
    settings = json.dumps({"command": command, "every_s": 0, "events": ["fallback", "rollback"]})
    yard = start_yard(settings={"restarts": 0}, notify=settings).ready()

    def events():
        return [json.loads(line)["event"] for line in sent.read_text().splitlines()] if sent.exists() else []

    yard.orders.order("promote")
    yard.orders.order("rollback")
    until(lambda: events() == ["rollback"], "the way back to be sent")
    os.kill(yard.engine("old")["pid"], signal.SIGKILL)
    until(lambda: events() == ["rollback", "fallback"], "the fallback to be sent")
    told = json.loads(sent.read_text().splitlines()[-1])
    assert (told["model"], told["engine"]) == ("m", "old")
    assert told["what"].startswith("fallback to new: old")
