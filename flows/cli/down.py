import signal
import time

from engines.errors import SwitchyardError
from engines.home import home
from engines.process.process import end_orphans
from engines.up import running_up
from engines.yard.client import YardClient
from flows.cli.options import Json
from flows.cli.order import DOWN_S, stop_yard
from flows.cli.output import print_done


def down(json_: Json = False) -> None:
    """Stop what `switchyard up` started, and the yard, after finishing the requests in flight."""
    folder = home()
    running = running_up(folder)
    if running is not None:
        deadline = time.monotonic() + DOWN_S
        if (process := running.process()) is not None:
            process.send_signal(signal.SIGTERM)
        while running.process() is not None:
            if time.monotonic() > deadline:
                raise SwitchyardError(f"`switchyard up` (pid {running.pid}) has not ended within {DOWN_S:.0f} s")
            time.sleep(0.1)
    ended = end_orphans(folder)
    if was_serving := YardClient(folder).runs():
        stop_yard(folder)
    print_done("all is down" if running or was_serving or ended else "nothing was up", json_)
