"""Drift of what serves: whether the same launch spec still finds the same next tokens as likely as before.

One token with its alternatives, asked while the engine is idle. The log-probabilities of those repeat (0 to 0.002 nats
between two processes of llama-server on a CPU, with 1 or 2 threads); another quant, KV type or template moves them by
0.2 nats and more. That one token suffices is from arXiv 2512.03816. The caller sees to it that asking costs no client
its cached prompt.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from engines.errors import BadInput
from engines.model.header import read_header
from engines.openai.paths import CHAT
from engines.process.readiness import TEXT, smallest_request
from engines.units import figure
from engines.whole_file import write_whole
from engines.yard.engine.launch_spec import LaunchSpec

ALTERNATIVES = 10
LOOKS = 3  # answers that make a baseline, and that have to differ before anything is said
SAME_NATS = 0.05
NOISE = 5.0  # times the largest difference between the answers of the baseline
RARE = math.log(0.01)  # less likely tokens are left out
CLOCKS = ("strftime_now", "date_string")  # what templates print the date with: each day is another prompt
KEPT = 64

Tops = dict[str, float]  # the likeliest tokens, and their log-probabilities


class Baseline(BaseModel):
    """What a launch spec answered, and how far its first answers lay apart, in nats."""

    tops: Tops
    noise: float
    at: float


class Drift:
    """The probe of one process. Its baseline is kept in the home, over restarts of the engine and of the yard."""

    def __init__(self, spec: LaunchSpec, home: Path, served_name: str) -> None:
        self._spec, self._served_name = spec, served_name
        self._file = home / "yard" / "drift.json"
        self._key = _key(spec)
        self._path = ""
        self._baseline: Baseline | None = None  # once an answer came
        self._answers: list[Tops] = []  # that make the baseline, or lie beyond it
        self._asked = self._looked = self._off = False

    @property
    def is_due(self) -> bool:
        """True until this process has been asked, and while its answers leave it open."""
        return not self._off and (not self._asked or bool(self._answers))

    @property
    def is_possible(self) -> bool:
        return not self._off

    @property
    def words(self) -> str:
        """What is known of this process, for the status."""
        if self._off:
            return "unknown: the engine lists no alternatives to its tokens"
        if not self._looked or self._baseline is None:
            return "not probed yet: that takes an idle engine without a client's prompt in its cache"
        if self._answers:
            return "looked at again: an answer was different"
        return f"answers as on {_day(self._baseline)}"

    def request(self) -> tuple[str, bytes]:
        """Path and body of the probe. Reads the file's header the first time."""
        self._path = self._path or _path(self._spec)
        extra: dict[str, object] = {"logprobs": ALTERNATIVES}
        if self._path == CHAT:
            extra = {"logprobs": True, "top_logprobs": ALTERNATIVES}
        return self._path, json.dumps({**smallest_request(self._path, self._served_name), **extra}).encode()

    def take(self, status: int, answer: bytes) -> str:
        """The words of an incident, where this answer proves a change; else ''."""
        self._asked, tops = True, _tops(answer) if status == 200 else {}
        if len(tops) < 2:
            self._off = True  # this engine does not list alternatives
            return ""
        self._looked = True
        baseline = self._baseline = self._baseline or self._known().get(self._key)
        if baseline is not None and distance(baseline.tops, tops) <= _limit(baseline):
            self._answers.clear()
            return ""
        self._answers.append(tops)
        if len(self._answers) < LOOKS:
            return ""
        first, moved = self._answers[0], [distance(baseline.tops, one) for one in self._answers] if baseline else []
        noise = max(distance(first, other) for other in self._answers)
        self._keep(Baseline(tops=first, noise=noise, at=time.time()))
        self._answers.clear()
        if baseline is None:
            return ""
        return (
            f"it answers differently than on {_day(baseline)}: likely next tokens differ by {figure(min(moved))} nats "
            f"(limit {figure(_limit(baseline))}). Check whether its model file, chat template or program was replaced, "
            "and evaluate it again; later answers are compared with the present ones"
        )

    def no_answer(self) -> None:
        """Wait for the next liveness probe: nothing may keep one from finding out what is wrong."""
        self._asked = True
        self._answers.clear()

    def _known(self) -> dict[str, Baseline]:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # pydantic's error is a ValueError
            stored = json.loads(self._file.read_bytes())
            return {key: Baseline.model_validate(one) for key, one in stored.items()}
        return {}

    def _keep(self, baseline: Baseline) -> None:
        self._baseline, known = baseline, self._known()
        known.pop(self._key, None)
        newest = {**dict(list(known.items())[1 - KEPT :]), self._key: baseline}
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_whole(self._file, json.dumps({key: one.model_dump() for key, one in newest.items()}))


def distance(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """The largest difference between log-probabilities of a token that either finds likely, in nats.

    A token that one does not list counts with the least that it lists: the difference is at least that.
    """
    likely = [token for token in one.keys() | other.keys() if max(one.get(token, RARE), other.get(token, RARE)) > RARE]
    least, least_other = min(one.values()), min(other.values())
    return max((abs(one.get(token, least) - other.get(token, least_other)) for token in likely), default=math.inf)


def _day(baseline: Baseline) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(baseline.at))


def _limit(baseline: Baseline) -> float:
    return max(SAME_NATS, NOISE * baseline.noise)


def _tops(answer: bytes) -> Tops:
    """The alternatives of an answer's one token, in the shape of chat or of the older completions; {} without any."""
    found: Any = {}
    with contextlib.suppress(ValueError, KeyError, IndexError, TypeError):
        logprobs = json.loads(answer)["choices"][0]["logprobs"]
        if "content" in logprobs:
            found = {one["token"]: one["logprob"] for one in logprobs["content"][0]["top_logprobs"]}
        else:
            found = dict(logprobs["top_logprobs"][0])
    is_number = [type(value) in (int, float) and math.isfinite(value) for value in found.values()]
    return found if all(is_number) else {}


def _path(spec: LaunchSpec) -> str:
    """Chat, whose template is part of what may change; a plain text where that template has a clock or is not known."""
    with contextlib.suppress(OSError, ValueError, BadInput):
        own = spec.settings.chat_template
        template = own.read_text(encoding="utf-8") if own else read_header(spec.gguf).chat_template
        if not spec.url and template and not any(clock in template for clock in CLOCKS):
            return CHAT
    return TEXT


def _key(spec: LaunchSpec) -> str:
    """By what a plan names, not by what lies there: the same file and program, or others under the same names."""
    what = spec.model_dump(
        mode="json", include={"engine", "kind", "form", "model_id", "gguf", "settings", "own", "url"}
    )
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]
