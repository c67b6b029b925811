"""For all tests: Ctrl-C reaches the process even where a script started it in the background, with SIGINT ignored."""

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Real engines first: they take long, and what is quick fills the gaps of the other workers."""
    items.sort(key=lambda item: item.get_closest_marker("engine") is None)
