"""For all tests: Ctrl-C reaches the process even where a script started it in the background, with SIGINT ignored."""

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
