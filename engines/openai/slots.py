"""Slots in which an engine keeps the prompts of its conversations, and how they are saved to files and restored."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from engines.settings import Serve


class Slot(NamedTuple):
    """One slot as the engine lists it; `tokens` is 0 where a build does not say how many lie in it."""

    id: int
    tokens: int
    is_busy: bool


class SlotFiles(Protocol):
    """The API of an engine for its slots. `path` lists them (GET); saving and restoring are POSTs with `body`."""

    path: str

    def key(self, build: str, serve: Serve) -> str:
        """Digest of all that a saved slot depends on: the build, the model's content, what shapes the KV cache.

        Engines check little of it: another model of the same shape takes the file, and answers nonsense. Reads files;
        raises BadInput where one of them cannot be read.
        """

    def listed(self, answer: bytes) -> list[Slot]:
        """The slots in an answer from `path`. Raises ValueError for an answer that is not this engine's."""

    def save(self, slot: int) -> str:
        """The path that saves a slot."""

    def restore(self, slot: int) -> str:
        """The path that restores it."""

    def body(self, file: str) -> bytes:
        """What is posted there, for a file in the folder that the engine was started with."""

    def tokens(self, status: int, answer: bytes) -> int:
        """How many tokens were saved or restored. Raises ValueError with the engine's words where it refused."""
