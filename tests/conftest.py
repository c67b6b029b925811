"""For all tests: nothing of a run outlives it, and Ctrl-C reaches it.

A script that starts it in the background has SIGINT ignored.
"""

import signal

import left_behind

left_behind.watch()
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Real engines first: they take long, and what is quick fills the gaps of the other workers."""
    items.sort(key=lambda item: item.get_closest_marker("engine") is None)
