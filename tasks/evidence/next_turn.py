"""What a move costs the next turn of a conversation: the time to its first token before it, after it, and back again.

An engine that has read a conversation answers the next turn at once; another one reads all of it first. Where prompts
are saved and restored around a planned stop, the way back, and the way there once more, cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from engines.client.load import measure
from engines.errors import BadInput, SwitchyardError
from engines.settings import Endpoint
from engines.units import number_of, quantity
from tasks.evidence.rehearsal import Stage, engine_of
from tasks.verdicts.verdict import CheckResult, at_most, not_measured

CHECK = "rehearsal.next_turn"
LIMIT = 1.3  # times the turn before, where prompts are saved
MOST_TOKENS = 3000
LEAST_TOKENS = 200
READ_S = 20.0  # what the conversation may take a slow engine to read, once
ANSWER_TOKENS = 16
TRIAL_LINES = 12
LINE = "{n}. The lamp at mile {n} was lit at dusk, and the keeper wrote down wind, sea and sail.\n"
Json = dict[str, Any]


class _Talk:
    """A conversation through a yard's public port: each turn asks something else after the same long beginning.

    So each has the same work left, whichever answers came before.
    """

    def __init__(self, stage: Stage, lines: int) -> None:
        self._stage = stage
        self._turns = 0
        self._messages: list[Json] = [
            {"role": "user", "content": "".join(LINE.format(n=n) for n in range(lines))},
            {"role": "assistant", "content": "I have read it."},
        ]

    def turn(self) -> Json:
        """One turn: ms to its first token, tokens of its prompt and how many of them were cached, and who answered."""
        self._turns += 1
        asked = {"role": "user", "content": f"What was lit at mile {self._turns}?"}
        stage = self._stage
        endpoint = Endpoint(base_url=stage.address, model_id=stage.model_id, engine="yard", api_key=stage.key)
        body = {"messages": [*self._messages, asked], "max_tokens": ANSWER_TOKENS, "temperature": 0}
        (record,) = measure(endpoint, [body], stall_s=stage.wait_s)
        if not record.ok or (ttft_ms := record.measured("ttft_ms")) is None:
            raise SwitchyardError(f"a turn of the conversation was not answered: {record.error or 'no token'}")
        by = stage.client.samples(stage.model_id)[-1]["engine"]
        return {
            "ttft_ms": ttft_ms,
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "by": by,
        }


def measure_next_turn(stage: Stage, *, form: str, say: Callable[[str], None]) -> Json:
    """A conversation on the incumbent, on the candidate after a move, back, and there again; the candidate serves then.

    The two last are left out where neither engine saves prompts. A turn that fails is evidence: `{"failed": reason}`.
    """
    move = {"model": stage.model_id, "form": form}
    try:
        lines = _lines(stage)
        say("measuring what a move costs the next turn of a conversation")
        talk = _Talk(stage, lines)
        found: Json = {"first": talk.turn(), "warm": talk.turn(), "before": talk.turn()}
        stage.client.order("promote", say, to=stage.candidate, **move)
        found["moved"] = talk.turn()
        if any(engine.get("prompts") for engine in stage.route()["engines"]):
            stage.client.order("rollback", say, **move)
            found["back"] = talk.turn()
            stage.client.order("promote", say, to=stage.candidate, **move)
            found["again"] = talk.turn()
        return found
    except SwitchyardError as error:
        return {"failed": str(error).splitlines()[0]}


def _lines(stage: Stage) -> int:
    """Lines of a conversation that the engine reads in READ_S, of MOST_TOKENS at most, within its context."""
    trial = _Talk(stage, TRIAL_LINES).turn()
    tokens = max(trial["prompt_tokens"] or 0, 10 * TRIAL_LINES)
    context = engine_of(stage.route(), stage.incumbent)["context_tokens"] or 2 * MOST_TOKENS
    readable = 1000 * tokens / trial["ttft_ms"] * READ_S
    wanted = max(min(MOST_TOKENS, readable, context / 2), LEAST_TOKENS)
    return max(int(wanted / tokens * TRIAL_LINES), 1)


def judge_next_turn(seen: Mapping[str, Any]) -> CheckResult:
    """Not required: a finding for whoever approves the move. PASS where saved prompts keep the turn as fast."""
    if why := seen.get("failed"):
        return not_measured(CHECK, str(why), required=False)
    why = cost_of(seen)
    like = {"back": "before", "again": "moved"}  # who gave the turn that the saved prompt is of
    saved = [
        turn
        for name, first in like.items()
        if (turn := seen.get(name)) and _found_again(turn) and turn["by"] == seen[first]["by"]
    ]
    if not saved:
        return not_measured(CHECK, f"{why}; no engine here keeps it over a stop", required=False)
    ratios = [turn["ttft_ms"] / seen["before"]["ttft_ms"] for turn in saved]
    if not all(map(math.isfinite, ratios)):  # `max` would hide a NaN
        raise BadInput("the time of a turn is not a finite number")
    ratio = max(ratios)
    why = f"{why}; {quantity(ratio, 'ratio')} with saved prompts"
    check = at_most(CHECK, ratio, limit=LIMIT, unit="ratio", why=why)
    return check.model_copy(update={"required": False})


def cost_of(seen: Mapping[str, Any]) -> str:
    """In words: each time to the first token of the next turn, and the engine that gave it."""
    n_tokens = seen["before"]["prompt_tokens"] or 0
    what = f"a conversation of {number_of(n_tokens, 'token')}, time to the first token of its next turn"
    said = {"before": "before the move", "moved": "after it", "back": "after the way back", "again": "there once more"}
    times = [
        f"{_time(seen[name]['ttft_ms'])} {words} ({seen[name]['by']})" for name, words in said.items() if name in seen
    ]
    return f"{what}: {', '.join(times)}"


def _time(ms: float) -> str:
    return f"{ms / 1000:.1f} s" if ms >= 1000 else f"{ms:.0f} ms"


def _found_again(turn: Mapping[str, Any]) -> bool:
    cached, prompt = turn["cached_tokens"], turn["prompt_tokens"]
    return bool(cached and prompt and 2 * cached >= prompt)
