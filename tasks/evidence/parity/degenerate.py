"""Text that is no answer at all: empty, garbage, a loop, scripts not asked for."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from engines.units import number_of
from tasks.evidence.parity.asking import Evidence

LOOP = "loop"
_CONTROL, _SYMBOLS = {"Cc", "Cn", "Co", "Cs"}, {"So", "Sm", "Sc"}  # Unicode categories


def degenerate_answer(answer: Evidence) -> str | None:
    if answer["tool_calls"]:
        return None
    # tokens that are parts of characters all look alike, so only whole ones can be counted
    tokens = [position[0] for position in answer["positions"]]
    whole = tokens if tokens and not any("\ufffd" in token for token in tokens) else None
    return degenerate(answer["text"] or answer["reasoning"], whole, prompt=answer["prompt"])


def degenerate(text: str, tokens: Sequence[str] | None = None, *, prompt: str = "") -> str | None:
    """Why `text` is no answer at all, or None: empty, garbage characters, a loop, scripts not asked for.

    Reasons that begin with "loop" come from small models by themselves; the others mean something is broken.
    `tokens` are the generated tokens' texts, words otherwise. It does not judge whether an answer is good or true.
    """
    bare = text.strip().rstrip("\ufffd")  # an answer cut at its token limit may end within a character
    if not bare:
        return "empty"
    broken = (c == "\ufffd" or (unicodedata.category(c) in _CONTROL and c not in "\n\r\t") for c in bare)
    share = sum(broken) / len(bare)
    if share > 0.10:
        return f"{share:.0%} replacement, control or unassigned characters"
    if len(bare) >= 8 and not any(c.isalnum() or unicodedata.category(c) in _SYMBOLS for c in bare):
        return f"no letters in {len(bare)} characters"
    words = bare.split()
    split = words if len(words) * 12 >= len(bare) else list(bare)  # characters, where the script has no spaces
    return _foreign(bare, prompt) or _loops(bare, list(tokens or split))


def _foreign(text: str, prompt: str) -> str | None:
    """Letters of three or more scripts that the prompt does not use, beside Latin, as more than a fifth of all."""
    letters = Counter(_script(c) for c in text if c.isalpha())
    expected = {_script(c) for c in prompt if c.isalpha()} | {"LATIN"}
    foreign = {script: n for script, n in letters.items() if script not in expected and n >= 2}
    if len(foreign) >= 3 and sum(foreign.values()) > 0.2 * sum(letters.values()):
        return f"mixed scripts: {', '.join(sorted(foreign))}"
    return None


def _script(letter: str) -> str:
    """The script by the first word of the character's name; Chinese and Japanese are one."""
    name = unicodedata.name(letter, "UNKNOWN").split()[0]
    return "CJK" if name in {"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "FULLWIDTH", "HALFWIDTH"} else name


def _loops(text: str, units: list[str]) -> str | None:
    run = max((len(found.group()) for found in re.finditer(r"(\S)\1*", text)), default=0)
    if run >= 24 and run >= 0.3 * len(text):
        return f"{LOOP}: one character {number_of(run, 'time')}"
    for period in range(1, len(units) // 4 + 1):
        covered = period  # how many of the last units repeat with this period; a last, incomplete round counts
        while covered < len(units) and units[-covered - 1] == units[-covered - 1 + period]:
            covered += 1
        if covered >= max(12, 4 * period, len(units) // 2):
            return f"{LOOP}: {' '.join(units[-period:])[:40]!r} {number_of(covered // period, 'time')}"
    if len(units) >= 24 and len(set(units)) < 0.15 * len(units):
        return f"{LOOP}: {len(set(units))} different of {number_of(len(units), 'token')}"
    return None
