"""Saved slots on the disk: for their owner alone, within a budget, taken once."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from engines.yard.engine.slot_store import MIB, NoRoom, SlotStore, Turn

TURNS = {"c": Turn(prompt_tokens=100, was_cached=True)}


def saved(store: SlotStore, key: str, *, n_bytes: int = 8, model: str = "m", engine: str = "old") -> None:
    for name in store.begin(key, [0, 1]).values():
        (store.folder / name).write_bytes(b"x" * n_bytes)
    store.commit(key, model=model, engine=engine, tokens={0: 100, 1: 70}, turns=TURNS)


@pytest.fixture
def store(tmp_path: Path) -> SlotStore:
    return SlotStore(tmp_path / "slots", lambda: 1)


def names(store: SlotStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def test_they_are_the_owners_alone(store: SlotStore) -> None:
    """Also while the engine writes them, and whatever its umask is."""
    saved(store, "a")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in store.folder.iterdir()}
    assert (modes, stat.S_IMODE(store.folder.stat().st_mode)) == ({0o600}, 0o700)


def test_what_is_taken_is_there_no_more(store: SlotStore) -> None:
    """So that what ends an engine ends it once; its files stay until they are restored."""
    saved(store, "a")
    found = store.take("a")
    assert found is not None
    assert [(one.slot, one.tokens) for one in found.slots] == [(0, 100), (1, 70)]
    assert found.turns == TURNS
    assert store.take("a") is None
    assert names(store) == ["a-0.slot", "a-1.slot"]
    store.sweep()
    assert names(store) == ["a-0.slot", "a-1.slot"], "another engine's end must not take them away"
    store.forget("a")
    assert names(store) == []


def test_a_file_that_was_cut_is_not_restored(store: SlotStore) -> None:
    saved(store, "a")
    (store.folder / "a-1.slot").write_bytes(b"x")
    assert store.take("a") is None
    assert names(store) == []


def test_short_prompts_and_failed_slots_are_not_kept(store: SlotStore) -> None:
    for name in store.begin("a", [0, 1, 2]).values():
        (store.folder / name).write_bytes(b"x")
    assert store.commit("a", model="m", engine="old", tokens={0: 63, 1: 64}, turns={}) == 64
    assert names(store) == ["a-1.slot", "a.json"]


def test_the_oldest_go_first(store: SlotStore) -> None:
    for key in ("a", "b", "c"):
        saved(store, key, n_bytes=MIB // 4)
    assert {name.partition(".")[0].partition("-")[0] for name in names(store)} == {"b", "c"}


def test_what_is_larger_than_the_budget_is_not_kept(store: SlotStore) -> None:
    saved(store, "a", n_bytes=MIB)
    assert names(store) == []


def test_a_full_disk_is_left_alone(tmp_path: Path) -> None:
    store = SlotStore(tmp_path / "slots", lambda: 2**40)
    with pytest.raises(NoRoom, match=r"less than yard\.prompt_cache_mib"):
        store.begin("a", [0])
    assert names(store) == []


def test_files_of_a_yard_that_was_killed_are_swept(store: SlotStore) -> None:
    """And records that cannot be read."""
    saved(store, "a")
    (store.folder / "b-0.slot").write_bytes(b"half")
    (store.folder / "c.json").write_text("{")
    SlotStore(store.folder, lambda: 1).sweep()
    assert names(store) == ["a-0.slot", "a-1.slot", "a.json"]


def test_those_of_an_engine_or_a_model_are_dropped(store: SlotStore) -> None:
    saved(store, "a", engine="old")
    saved(store, "b", engine="new", model="n")
    saved(store, "c", engine="new", model="m")
    store.drop(engines={"old"}, models={"n"})
    assert names(store) == ["c-0.slot", "c-1.slot", "c.json"]


def test_a_proof_outlives_the_yard(store: SlotStore) -> None:
    store.prove("a", works=False, why="nothing was found again")
    again = SlotStore(store.folder, lambda: 1).proof("a")
    assert again is not None
    assert (again.works, again.why) == (False, "nothing was found again")
    assert store.proof("b") is None
