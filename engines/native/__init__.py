"""mistral.rs inside the program: the engine without a server, and the worker process in which the yard holds it."""
