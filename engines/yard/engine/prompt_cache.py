"""Carries the prompts in an engine's slots over a planned stop, and finds out whether that is of any use.

Saved before the stop, restored after the next start of the same build with the same model. A restore can succeed and
do nothing: only the cached share of the next request shows it. One that did nothing is not tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Callable

from engines.deadline import in_thread
from engines.driver import build_digest
from engines.errors import BadInput
from engines.openai.call import Call
from engines.openai.slots import SlotFiles
from engines.settings import Serve
from engines.units import number_of
from engines.yard.engine.connection import EngineConnection, Gone
from engines.yard.engine.in_flight import InFlight
from engines.yard.engine.launch_spec import LaunchSpec
from engines.yard.engine.slot_store import NoRoom, SlotStore, Turn

SAVE_S = 20.0  # for all slots together: on a slow disk the rest is given up
RESTORE_S = 20.0
KEPT, LOST = 0.5, 0.1  # shares of a conversation's last prompt that are found again, and that are not


class RestoreBroke(Exception):
    """The engine went away while it restored a slot."""


class PromptCache:
    """The slots of one engine. `note` takes an event's kind and its words."""

    def __init__(
        self, spec: LaunchSpec, files: SlotFiles | None, store: SlotStore | None, note: Callable[[str, str], None]
    ) -> None:
        self.used = False  # its present process has had a request of a client, or a restored slot
        self.key = ""  # of its present process; empty where nothing is saved
        self._is_saved = False  # and nothing came since
        self._spec, self._files, self._store, self._note = spec, files, store, note
        self._turns: dict[str, Turn] = {}  # the last conversations, as many as there are slots
        self._restored: dict[str, Turn] = {}  # those of the stop before, until the next request
        self._taken = 0  # requests since then
        self._keying: asyncio.Task[None] | None = None

    def prepare(self, serve: Serve) -> Serve:
        """What to start: with a folder for slots, where it can save them and the plan allows it."""
        self.used, self._is_saved, self.key, self._turns, self._restored = False, False, "", {}, {}
        if self._keying is not None:
            self._keying.cancel()
        files, store, found = self._files, self._store, self._spec.installation
        if files is None or store is None or not store.budget_mib():
            return serve

        async def find_key() -> None:  # beside the load, which it must not delay
            def read() -> str:
                return files.key(f"{found.form} {found.version} {build_digest(found)}", serve)

            with contextlib.suppress(BadInput, OSError):  # the engine says itself what it cannot read
                self.key = await in_thread(read, name="key of saved prompts")

        with contextlib.suppress(OSError):
            store.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._keying = asyncio.create_task(find_key())
            return serve.model_copy(update={"slots": store.folder})
        return serve

    async def save(self, connection: EngineConnection, within_s: float = SAVE_S) -> None:
        """Save the slots that no request is using. Never raises: a prompt that is lost is read again."""
        files, store, key, done = self._files, self._store, self.key, dict[int, int]()
        has_new = self.used and not self._is_saved
        if files is None or store is None or not has_new or not key or not store.budget_mib() or self._is_of_no_use:
            return
        self._is_saved = True
        try:
            async with asyncio.timeout(min(max(within_s, 0), SAVE_S)):
                async with connection.ask("GET", files.path) as answer:
                    slots = [slot for slot in files.listed(await answer.read()) if not slot.is_busy]
                names = await in_thread(lambda: store.begin(key, [slot.id for slot in slots]), name="files for slots")
                for slot in sorted(slots, key=lambda one: -one.tokens):
                    done[slot.id] = await self._act(connection, files.save(slot.id), files.body(names[slot.id]))
        except (NoRoom, ValueError, OSError, TimeoutError) as error:  # Gone is a ConnectionError
            why = str(error) or f"it took longer than {min(within_s, SAVE_S):g} s"
            self._note("yard", f"prompts could not be saved: {why}")
        n_tokens = 0
        with contextlib.suppress(OSError):
            n_tokens = await in_thread(
                lambda: store.commit(
                    key, model=self._spec.model_id, engine=self._spec.engine, tokens=done, turns=self._turns
                ),
                name="record of saved prompts",
            )
        if n_tokens:
            self._note("yard", f"prompts saved: {number_of(n_tokens, 'token')}")

    async def restore(self, connection: EngineConnection) -> None:
        """Restore what was saved for just this engine into a process that has had no request.

        Raises RestoreBroke when the engine goes away meanwhile: it is started again without.
        """
        if self._keying is not None:
            await asyncio.wait([self._keying])
        files, store, key = self._files, self._store, self.key
        if files is None or store is None or not key or self.used or self._is_of_no_use:
            return
        saved = None
        with contextlib.suppress(OSError):
            saved = await in_thread(lambda: store.take(key), name="saved prompts")
        if saved is None:
            return
        try:
            async with asyncio.timeout(RESTORE_S):
                async with connection.ask("GET", files.path) as answer:
                    here = {slot.id for slot in files.listed(await answer.read())}
                for one in saved.slots:  # a slot that it lacks would be another one: it counts around
                    if one.slot in here:
                        n_tokens = await self._act(connection, files.restore(one.slot), files.body(one.file))
                        if n_tokens != one.tokens:
                            raise ValueError(f"{number_of(n_tokens, 'token')} came back of {one.tokens}")
        except (Gone, ValueError, TimeoutError) as error:
            why = str(error) or f"it took longer than {RESTORE_S:g} s"
            self._disprove(f"a restore failed: {why}")
            if isinstance(error, Gone):
                raise RestoreBroke(why) from error
            return
        finally:
            with contextlib.suppress(OSError):
                await in_thread(lambda: store.forget(key), name="restored prompts")
        self.used, self._taken, self._restored = True, 0, saved.turns
        self._note("yard", f"prompts restored: {number_of(sum(one.tokens for one in saved.slots), 'token')}")

    def taken(self) -> None:
        """Note that a client's request lies in a slot from now on."""
        self.used, self._is_saved = True, False
        self._taken += 1

    def served(self, call: Call, running: InFlight) -> None:
        """Learn from a request that was answered: what the next one of its conversation should find in the cache."""
        if not self.key or not call.generates_text:
            return
        restored, self._restored = self._restored, {}
        if running.cached is None:
            return
        (cached, prompt), name = running.cached, _name_of(call)
        before = self._turns.pop(name, None)
        self._turns[name] = Turn(prompt_tokens=prompt, was_cached=before is not None and _is_kept(cached, before))
        for oldest in list(self._turns)[: -self._spec.settings.sequences]:
            del self._turns[oldest]
        if (turn := restored.get(name)) is None or self._store is None or self._taken != 1:
            return  # what it found may be another request's
        found = f"{cached:,} of {number_of(prompt, 'prompt token')} were in the cache after a restore"
        is_in_a_slot = name == next(reversed(restored)) and turn.was_cached and prompt >= turn.prompt_tokens
        if _is_kept(cached, turn):
            if self._store.proof(self.key) is None:
                self._note("yard", f"prompts survive a restart of this build: {found}")
                self._store.prove(self.key, works=True, why=found)
        elif is_in_a_slot and cached < LOST * turn.prompt_tokens:
            self._disprove(f"a restore did nothing: {found}, {turn.prompt_tokens:,} were saved")

    def status(self) -> str:
        """For `switchyard status`: whether prompts survive a planned restart; empty where nothing is saved."""
        if not self.key or self._store is None or not self._store.budget_mib():
            return ""
        proof = self._store.proof(self.key)
        if proof is None:
            return "not proved yet: the next request after a restart shows it"
        return f"{'proved' if proof.works else 'does not work with this build'}: {proof.why}"

    @property
    def _is_of_no_use(self) -> bool:
        proof = self._store.proof(self.key) if self._store else None
        return proof is not None and not proof.works

    def _disprove(self, why: str) -> None:
        assert self._store is not None
        self._note("incident", f"prompts do not survive a restart of this build, which is not tried again: {why}")
        self._store.prove(self.key, works=False, why=why)

    async def _act(self, connection: EngineConnection, path: str, body: bytes) -> int:
        assert self._files is not None
        async with connection.ask("POST", path, body) as answer:
            try:
                return self._files.tokens(answer.status, await answer.read())
            except (KeyError, TypeError) as error:
                raise ValueError(f"an answer that is none to {path}") from error


def _is_kept(cached: int, turn: Turn) -> bool:
    return cached >= KEPT * turn.prompt_tokens


def _name_of(call: Call) -> str:
    """A name of the conversation that does not hold its text."""
    return hashlib.blake2b(call.conversation().encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
