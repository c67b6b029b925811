"""For all tests: nothing of a run outlives it, and Ctrl-C reaches it.

A script that starts it in the background has SIGINT ignored.
"""

import signal

import left_behind

left_behind.watch()
signal.signal(signal.SIGINT, signal.default_int_handler)


# files with the longest tests, the longest first: what comes last is short, and no worker waits for another
LONG = (
    *("old_home", "demo", "unmeasured", "evaluate", "schedules", "vllm", "browser", "attached", "surroundings"),
    *("subprocess_phase", "fleet", "upgrade", "preflight", "up", "clients", "serve", "third_engine", "named_engines"),
)


def pytest_collection_modifyitems(items):
    """Then the other real engines; what is quick fills the gaps of the other workers."""
    place = {f"test_{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: (place.get(item.path.stem, len(place)), item.get_closest_marker("engine") is None))
