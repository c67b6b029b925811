"""Compare two engines' answers: distributions up to the first different token, texts and lengths."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from engines.errors import BadInput
from tasks.evidence.parity.asking import Evidence, by_id
from tasks.evidence.parity.degenerate import degenerate_answer
from tasks.verdicts.limits import MIN_PROMPTS
from tasks.verdicts.statistics import percentile, wilson

RESAMPLES = 1000  # for the bounds of a KLD


def compare_answers(incumbent: Evidence, candidate: Evidence, *, tie_gap_nats: float = 0.5) -> Evidence:
    """Two `measure_answers`, prompt by prompt: top-1 agreement, KLD, divergences, texts, lengths.

    Positions run up to and including the first different token; after it the contexts differ and nothing is compared.
    Prompts that the engines read as different numbers of tokens are listed and left out of the positions. A divergence
    is explained iff the incumbent holds the candidate's token less than `tie_gap_nats` under its own; as the
    second-best token is at least as near, its top two are then a near tie. `explained` is None where neither engine
    shows the logprobs at the difference.
    """
    ours, theirs = by_id(incumbent["answers"]), by_id(candidate["answers"])
    pairs = [(answer, theirs[name]) for name, answer in ours.items() if name in theirs]
    sound = [(ours, other) for ours, other in pairs if not ours["error"] and not other["error"]]
    failed = [(ours, other) for ours, other in pairs if ours["error"] or other["error"]]
    aligned = [pair for pair in sound if pair[0]["prompt_tokens"] == pair[1]["prompt_tokens"]]
    match = _Match(aligned)
    walks = [_walk(ours, other, match) for ours, other in aligned]
    klds = [walk.klds for walk in walks if walk.klds]
    hidden = sum(walk.hidden for walk in walks)
    divergences = [
        _divergence(ours, other, walk, tie_gap_nats)
        for (ours, other), walk in zip(aligned, walks, strict=True)
        if walk.diverged is not None
    ]
    return {
        "prompts": len(incumbent["answers"]),
        "prompts_compared": len(aligned),
        "prompt_tokens_differ": [ours["id"] for ours, other in sound if (ours, other) not in aligned],
        "errors": [f"{ours['id']}: {ours['error'] or other['error']}" for ours, other in failed],
        "matched_by": match.by,
        "tie_gap_nats": tie_gap_nats,
        **_position_numbers(klds, hidden, sum(not walk.unseen for walk in walks if walk.diverged), len(divergences)),
        "hidden_positions": hidden,
        "candidate_lists": max((len(one[3]) for _, other in aligned for one in other["positions"]), default=0),
        "divergences": divergences,
        **_text_numbers(sound),
    }


def _position_numbers(by_prompt: list[list[float]], hidden: int, seen: int, diverged: int) -> Evidence:
    """Agreement and KLD (nats) over all compared positions, with one-sided 95% bounds; None without any.

    `hidden` tokens agree (their text does) but have no KLD; of the `diverged` positions `seen` have one.
    """
    klds = [kld for one in by_prompt for kld in one]
    if not klds:
        kinds = ("mean_kld", "p99_kld")
        names = ["top1_agreement", "top1_low", "top1_high", "max_kld", *kinds]
        names += [f"{name}_{end}" for name in kinds for end in ("low", "high")]
        return {"positions": 0, "same_top1": 0, **dict.fromkeys(names)}
    same = len(klds) - seen + hidden
    trials = same + diverged
    low, high = wilson(same, trials, 0.90)  # both ends of the two-sided 90%: one-sided 95% each
    return {
        "positions": len(klds),
        "same_top1": same,
        "top1_agreement": same / trials,
        "top1_low": low,
        "top1_high": high,
        "mean_kld": fmean(klds),
        "p99_kld": percentile(klds, 0.99),
        "max_kld": max(klds),
        **_bounds(by_prompt),
    }


def _bounds(by_prompt: list[list[float]]) -> Evidence:
    """One-sided 95% bounds of the mean and the 99th percentile: both over prompts drawn again, with replacement.

    Positions of one prompt belong together; of few prompts, positions are drawn.
    """
    if len(by_prompt) < MIN_PROMPTS:
        by_prompt = [[kld] for one in by_prompt for kld in one]
    drawn = np.random.default_rng(0).integers(len(by_prompt), size=(RESAMPLES, len(by_prompt)))
    klds = [np.array(one) for one in by_prompt]
    samples = [np.concatenate([klds[index] for index in draw]) for draw in drawn]
    figures = {"mean_kld": [s.mean() for s in samples], "p99_kld": [np.percentile(s, 99) for s in samples]}
    ends = {name: np.percentile(values, (5, 95)) for name, values in figures.items()}
    return {f"{name}_{end}": float(both[i]) for name, both in ends.items() for i, end in enumerate(("low", "high"))}


class _Match:
    """Which tokens of both engines count as the same: by id on one vocabulary, else by text.

    By text, the end of the answer is one token whatever its name: llama.cpp shows it as an empty text, mistral.rs as
    `<|im_end|>`; tokens that share a text (parts of characters do) are one outcome. Ollama cuts such a part off the end
    of a text, others show U+FFFD there: it does not count, so that a part alone is one outcome with the end. vLLM shows
    no text at all for a token that ends in a part: where one engine does so, all of them are that outcome.
    """

    def __init__(self, pairs: Sequence[tuple[Evidence, Evidence]]) -> None:
        ours, theirs = _vocabulary(a for a, _ in pairs), _vocabulary(b for _, b in pairs)
        shared = [ours[i] == theirs[i] for i in ours.keys() & theirs.keys() if _readable(ours[i], theirs[i])]
        complete = all(p[2] is not None for pair in pairs for answer in pair for p in answer["positions"])
        self.by = "id" if complete and shared and fmean(shared) > 0.99 else "text"
        self.ends = {""} | {
            answer["positions"][-1][0]
            for pair in pairs
            for answer in pair
            if answer["finish_reason"] == "stop"
            and answer["positions"]
            and not answer["text"].endswith(answer["positions"][-1][0])
        }
        self.parts_vanish = False
        self.parts_vanish = self.by == "text" and self._parts_vanish(pairs)

    def key(self, token: list[Any]) -> Any:
        """What two tokens have in common when they are the same."""
        if self.by == "id":
            return token[2]
        if token[0] in self.ends or (self.parts_vanish and "\ufffd" in token[0]):
            return ""
        return token[0].replace("\ufffd", "")

    def _parts_vanish(self, pairs: Sequence[tuple[Evidence, Evidence]]) -> bool:
        """Whether one engine lists as many more empty texts as the other lists texts before a part of a character."""
        empty, before = [0, 0], [0, 0]
        for pair in pairs:
            for both in zip(*(answer["positions"] for answer in pair), strict=False):
                if not self.same(*both):
                    break  # behind it other tokens are listed
                if _joins(*both):
                    continue
                for side, position in enumerate(both):
                    empty[side] += sum(not self.key(token) for token in position[3])
                    before[side] += sum(bool(self.key(token)) and "\ufffd" in token[0] for token in position[3])
        (ours, theirs), more = empty, before[0] - before[1]
        return abs(ours - theirs + more) < abs(ours - theirs)

    def top(self, position: list[Any]) -> dict[Any, float]:
        """Probability by key of the tokens shown at one position, the generated one among them."""
        shown: dict[Any, float] = {}
        listed = any(self.key(token) == self.key(position) for token in position[3])
        for token in position[3] if listed else [position, *position[3]]:
            if math.isnan(token[1]):
                raise BadInput(f"the log-probability of {token[0]!r} is NaN: the engine computes no distribution")
            shown[self.key(token)] = shown.get(self.key(token), 0.0) + math.exp(min(0.0, token[1]))
        return shown

    def same(self, ours: list[Any], theirs: list[Any]) -> bool:
        """Both engines generated this token; by id, whole characters must agree too (llama.cpp shows them joined)."""
        if self.key(ours) != self.key(theirs):
            return False
        return self.by == "text" or ours[0] == theirs[0] or not _readable(ours[0], theirs[0])


def _vocabulary(answers: Iterable[Evidence]) -> dict[int, str]:
    tokens = (token for answer in answers for position in answer["positions"] for token in position[3])
    return {token[2]: token[0] for token in tokens if token[2] is not None}


def _readable(*texts: str) -> bool:
    """Whole characters on both sides, neither a special token nor a part of a character."""
    return all(text and "\ufffd" not in text and not text.startswith("<") for text in texts)


@dataclass(frozen=True)
class _Walk:
    """KLD by position, tokens passed unseen, and the first difference; `unseen`: it has no KLD."""

    klds: list[float]
    hidden: int
    diverged: tuple[int, int] | None = None
    unseen: bool = False
    gap: float | None = None
    choice_gap: float | None = None


def _walk(incumbent: Evidence, candidate: Evidence, match: _Match) -> _Walk:
    """The KLD at each position both engines show, and where the first different token is.

    llama.cpp shows one entry, that of the last token, for a character made of several tokens; mistral.rs shows each
    token as U+FFFD. Where the texts agree, the walk continues behind the character and counts what it passed as hidden.
    """
    ours, theirs = incumbent["positions"], candidate["positions"]
    klds: list[float] = []
    i = j = hidden = 0
    while i < len(ours) and j < len(theirs):
        if not match.same(ours[i], theirs[j]):
            passed = _past_character(incumbent, candidate, i, j)
            if passed is None:
                return _diverged(_Walk(klds, hidden), incumbent, candidate, (i, j), match)
            hidden += passed[0] - i + passed[1] - j
            i, j = passed
        if match.by == "text" and _joins(ours[i], theirs[j]):
            hidden += 1
        else:
            klds.append(_kld_at(match, ours[i], theirs[j]))
        i, j = i + 1, j + 1
    # llama.cpp lists the end of the answer as a position of its own, our host of mistral.rs does not: no difference
    left, left_there = (any(one[0] not in match.ends for one in more) for more in (ours[i:], theirs[j:]))
    early = left and candidate["finish_reason"] != "length", left_there and incumbent["finish_reason"] != "length"
    if any(early) and ours and theirs:
        return _Walk(klds, hidden, diverged=(i, j), unseen=True)
    return _Walk(klds, hidden)


def _diverged(walk: _Walk, incumbent: Evidence, candidate: Evidence, at: tuple[int, int], match: _Match) -> _Walk:
    """The end of a walk at different tokens, with the incumbent's gaps there.

    Where the difference lies within a character that one engine shows as one entry, the other's nearest tie within that
    character stands in for both gaps, and the position has no KLD.
    """
    ours, theirs = incumbent["positions"], candidate["positions"]
    i, j = at
    if _hides(ours[i]) or _hides(theirs[j]):
        shown = [] if _hides(theirs[j]) else _parts(theirs, j)
        shown = shown if _hides(ours[i]) else _parts(ours, i)
        gap = min((_tie_gap(one) for one in shown if len(one[3]) > 1), default=None)
        return replace(walk, diverged=at, unseen=True, gap=gap, choice_gap=gap)
    walk.klds.append(_kld_at(match, ours[i], theirs[j]))
    top = match.top(ours[i])
    chosen, least = top[match.key(ours[i])], min(top.values())
    second = max((p for key, p in top.items() if key != match.key(ours[i])), default=least)
    # a token that the incumbent does not list is under the last one that it lists
    other = top.get(match.key(theirs[j]), least)
    return replace(walk, diverged=at, gap=_nats(chosen, second), choice_gap=_nats(chosen, other))


def _hides(position: list[Any]) -> bool:
    """The entry shows a whole character, but its token is only the last part of it (llama.cpp joins the parts).

    Where tokens have no ids (Ollama), it is the part that is listed as just as likely.
    """
    text, logprob, token_id, listed = position
    if "\ufffd" in text or (token_id is None and any(token[0] == text for token in listed)):
        return False
    same, place = (logprob, 1) if token_id is None else (token_id, 2)
    return any(token[place] == same and "\ufffd" in token[0] for token in listed)


def _joins(ours: list[Any], theirs: list[Any]) -> bool:
    """Beside the same whole character an engine lists parts of characters, which have no text to be compared by."""
    return (_hides(ours) or _hides(theirs)) and "\ufffd" not in ours[0] + theirs[0]


def _parts(positions: list[list[Any]], start: int) -> list[list[Any]]:
    """The entry at `start`, with the parts of a character that follow when it is one."""
    end = start + 1
    while end < len(positions) and "\ufffd" in positions[start][0] and "\ufffd" in positions[end][0]:
        end += 1
    return positions[start:end]


def _tie_gap(position: list[Any]) -> float:
    """Nats between the two best tokens listed."""
    best = sorted((token[1] for token in position[3]), reverse=True)
    return float(best[0] - best[1])


def _nats(larger: float, smaller: float) -> float:
    return math.log(max(larger, 1e-12) / max(smaller, 1e-12))


def _past_character(incumbent: Evidence, candidate: Evidence, i: int, j: int) -> tuple[int, int] | None:
    """Indices of the last token of the character that one engine shows whole and the other in parts; None if unlike."""
    ours, theirs = incumbent["positions"], candidate["positions"]
    if "\ufffd" in theirs[j][0] and "\ufffd" not in ours[i][0]:
        last = _end_of_parts(ours, i, theirs, j, candidate["text"])
        return None if last is None else (i, last)
    if "\ufffd" in ours[i][0] and "\ufffd" not in theirs[j][0]:
        last = _end_of_parts(theirs, j, ours, i, incumbent["text"])
        return None if last is None else (last, j)
    return None


def _end_of_parts(whole: list[list[Any]], at: int, parts: list[list[Any]], start: int, parts_text: str) -> int | None:
    """Where in `parts` the text of `whole[at]` ends: same last id, and the other engine's text has it at that place."""
    text, _, token_id, _ = whole[at]
    offset = sum(len(position[0]) for position in whole[:at])
    if token_id is None or not text or not parts_text.startswith(text, offset):
        return None
    for index in range(start, min(len(parts), start + 4 * len(text))):  # UTF-8 has at most 4 bytes a character
        if "\ufffd" not in parts[index][0]:
            return None
        if parts[index][2] == token_id:
            return index
    return None


def _kld_at(match: _Match, ours: list[Any], theirs: list[Any]) -> float:
    shown = match.top(ours)
    return kld(shown, *fill_missing(shown, match.top(theirs)))


def fill_missing(shown: dict[Any, float], other: dict[Any, float]) -> tuple[dict[Any, float], float]:
    """The other engine's probabilities of the `shown` tokens and of all the rest, as near to `shown` as can be.

    A token that the other engine does not list has there at most the least probability it lists; what the other lists
    beyond `shown` belongs to the rest. Within these bounds the unknown masses are those with the smallest KLD (each a
    common multiple of the incumbent's, clipped at its bound), so the KLD from them is a lower bound of the true one.
    """
    missing = [key for key in shown if key not in other]
    free = max(0.0, 1.0 - sum(other[key] for key in shown if key in other))
    if not missing:
        return {key: other[key] for key in shown}, free
    cap = min(other.values(), default=1.0)
    floor = min(free, sum(p for key, p in other.items() if key not in shown))
    rest = max(0.0, 1.0 - sum(shown.values()))

    def spread(multiple: float) -> tuple[list[float], float]:
        return [min(cap, multiple * shown[key]) for key in missing], max(floor, multiple * rest)

    low, high = 0.0, 1e6
    for _ in range(80):
        middle = (low + high) / 2
        masses, tail = spread(middle)
        low, high = (middle, high) if sum(masses) + tail < free else (low, middle)
    masses, _ = spread(low)
    tail = max(0.0, free - sum(masses))
    return {key: other.get(key, 0.0) for key in shown} | dict(zip(missing, masses, strict=True)), tail


def kld(shown: dict[Any, float], filled: dict[Any, float], tail: float) -> float:
    """sum p ln(p/q) in nats over the incumbent's listed tokens and one bucket for all the others; never negative.

    p is the incumbent's. The bucket makes it a lower bound of the KLD over the whole vocabulary, by which llama.cpp's
    perplexity tool defines it (llama.cpp#5081); with 20 tokens listed they differ little.
    """
    least = 1e-12
    terms = [p * math.log(p / max(filled[key], least)) for key, p in shown.items() if p > 0]
    rest = max(0.0, 1.0 - sum(shown.values()))
    if rest > least:
        terms.append(rest * math.log(rest / max(tail, least)))
    return max(0.0, sum(terms))


def _divergence(incumbent: Evidence, candidate: Evidence, walk: _Walk, tie_gap_nats: float) -> Evidence:
    assert walk.diverged is not None
    i, j = walk.diverged
    gap = walk.choice_gap
    return {
        "prompt": incumbent["id"],
        "position": i,
        "gap_nats": walk.gap,
        "choice_gap_nats": gap,
        "explained": None if gap is None else gap < tie_gap_nats,
        "incumbent_token": incumbent["positions"][i][0] if i < len(incumbent["positions"]) else None,
        "candidate_token": candidate["positions"][j][0] if j < len(candidate["positions"]) else None,
    }


def _text_numbers(pairs: Sequence[tuple[Evidence, Evidence]]) -> Evidence:
    """Shares over whole answers: equal texts, finish reasons, lengths, degenerate ones."""
    alike = [(a, b) for a, b in pairs if a["text"] == b["text"] and a["tool_calls"] == b["tool_calls"]]
    arms = {"incumbent": [a for a, _ in pairs], "candidate": [b for _, b in pairs]}
    differ = [(a["id"], a["finish_reason"], b["finish_reason"]) for a, b in alike]
    tallies = {arm: dict(Counter(str(one["finish_reason"]) for one in answers)) for arm, answers in arms.items()}
    return {
        "exact_match_share": len(alike) / len(pairs) if pairs else None,
        "finish_reason_agreement": fmean(a["finish_reason"] == b["finish_reason"] for a, b in pairs) if pairs else None,
        "finish_reasons": tallies
        | {"differ_on_equal_text": [f"{key}: {ours} vs {theirs}" for key, ours, theirs in differ if ours != theirs]},
        "length": _length_ratio([(a["completion_tokens"], b["completion_tokens"]) for a, b in pairs]),
        "degenerate": {
            arm: {one["id"]: why for one in answers if (why := degenerate_answer(one))} for arm, answers in arms.items()
        },
    }


def _length_ratio(lengths: list[tuple[int | None, int | None]]) -> Evidence:
    """Candidate's mean tokens over the incumbent's with a 95% bootstrap interval over prompts (fixed seed)."""
    known = [(a, b) for a, b in lengths if a and b is not None]
    if len(known) < 2:
        return {"prompts": len(known), "ratio": None, "low": None, "high": None}

    def ratio(sample: Sequence[tuple[int, int]]) -> float:
        return sum(b for _, b in sample) / sum(a for a, _ in sample)

    rng = random.Random(20)
    resampled = [ratio(rng.choices(known, k=len(known))) for _ in range(2000)]
    low, high = percentile(resampled, 0.025), percentile(resampled, 0.975)
    return {"prompts": len(known), "ratio": ratio(known), "low": low, "high": high}
