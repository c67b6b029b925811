"""Sampling parameters that an engine accepts and ignores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from engines.settings import Endpoint
from tasks.evidence.behaviours.caller import Caller
from tasks.evidence.parity.asking import TIMEOUT_S, Evidence, Progress, origin, post
from tasks.verdicts.verdict import CheckResult, Verdict, at_most, not_measured

WISH = "Write a short story about a lighthouse and its keeper."
SCHEMA = {
    "type": "object",
    "properties": {"zq": {"type": "integer"}},
    "required": ["zq"],
    "additionalProperties": False,
}


def measure_ignored_parameters(
    endpoint: Endpoint, *, timeout_s: float = TIMEOUT_S, progress: Progress = lambda _: None
) -> Evidence:
    """For parameters beyond OpenAI's: what was sent, whether it had its effect (None: cannot tell), and what was seen.

    OpenAI's own are among the compatibility battery's behaviours: `with_behaviours` adds them. A 200 proves nothing:
    engines drop parameters they do not know. So each probe sends one parameter and looks for what it must change. A
    refusal is no silence: effect None, and its text. Whether a probe can show an effect depends on the model, so the
    incumbent's result is the yardstick.
    """
    with _Probe(endpoint, read_timeout_s=timeout_s) as probe:
        found: Evidence = {}
        for name, look in _PROBES.items():
            try:
                found[name] = look(probe)
            except _NoAnswerError as refusal:
                found[name] = {"sent": refusal.sent, "effect": None, "observed": str(refusal)}
            progress(f"{endpoint.engine}: parameter {name}: {_effect_word(found[name]['effect'])}")
    return origin(endpoint) | {"parameters": found}


def _effect_word(effect: bool | None) -> str:
    return {True: "took effect", False: "had no effect", None: "cannot tell"}[effect]


class _NoAnswerError(Exception):
    """A probe's request was refused or failed; `sent` is what it carried."""

    def __init__(self, message: str, sent: Evidence) -> None:
        super().__init__(message)
        self.sent = sent


class _Probe(Caller):
    """Asks one engine the same wish with one parameter changed; greedy unless told otherwise."""

    def ask(self, wish: str = WISH, **sent: Any) -> Evidence:
        """The parsed answer; _NoAnswerError with the refusal's text otherwise."""
        body = {"model": self.endpoint.model_id, "messages": [{"role": "user", "content": wish}]}
        answer, error = post(self, "/v1/chat/completions", body | {"temperature": 0, "max_tokens": 16} | sent)
        if answer is None or not answer.get("choices"):
            raise _NoAnswerError(error or "no choices in the answer", sent)
        return answer

    def text(self, wish: str = WISH, **sent: Any) -> str:
        """The first choice's text."""
        return str(self.ask(wish, **sent)["choices"][0]["message"].get("content") or "")

    @cached_property
    def greedy(self) -> Evidence:
        """The plain greedy answer with logprobs, asked once."""
        return self.ask(logprobs=True, top_logprobs=5)

    @cached_property
    def longer(self) -> str:
        """The plain greedy text, long enough for words to come again; asked once."""
        return self.text(max_tokens=40)

    @property
    def greedy_text(self) -> str:
        """What the engine says when nothing special is asked."""
        return str(self.greedy["choices"][0]["message"].get("content") or "")


def _seen(sent: Evidence, effect: bool | None, observed: str) -> Evidence:
    return {"sent": sent, "effect": effect, "observed": observed}


def _changes_greedy(**sent: Any) -> Callable[[_Probe], Evidence]:
    """A probe for what must change a greedy text in which words come again."""

    def look(probe: _Probe) -> Evidence:
        plain, text = probe.longer, probe.text(max_tokens=40, **sent)
        return _seen(sent, plain != text, f"without {plain[-40:]!r}, with {text[-40:]!r}")

    return look


def _makes_greedy(**sent: Any) -> Callable[[_Probe], Evidence]:
    """A probe for what must leave only the best token at a high temperature."""

    def look(probe: _Probe) -> Evidence:
        hot = probe.text(temperature=2.0, seed=11)
        if hot == probe.greedy_text:
            return _seen(sent, None, "a high temperature alone changes nothing here")
        text = probe.text(temperature=2.0, seed=11, **sent)
        return _seen(sent, text == probe.greedy_text, f"greedy {probe.greedy_text[:40]!r}, got {text[:40]!r}")

    return look


_PROBES: dict[str, Callable[[_Probe], Evidence]] = {
    "repeat_penalty": _changes_greedy(repeat_penalty=1.8),
    "repetition_penalty": _changes_greedy(repetition_penalty=1.8),
    "min_p": _makes_greedy(min_p=0.999),
}
# OpenAI's own parameters, and the API behaviour that proves each one's effect
BEHAVIOUR_OF = {
    "max_tokens": "max_tokens",
    "temperature": "temperature_varies",
    "seed": "seed",
    "stop": "stop_string",
    "logit_bias": "logit_bias",
    "n": "two_choices",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "top_p": "top_p",
    "top_k": "top_k",
    "stream_options.include_usage": "usage_in_stream",
    "logprobs": "logprobs",
    "response_format.json_object": "json_object",
    "response_format.json_schema": "json_schema",
    "ignore_eos": "ignore_eos",
}


def with_behaviours(parameters: Evidence, compatibility: Evidence) -> Evidence:
    """What `measure_ignored_parameters` found, and what the compatibility battery's behaviours prove beside it."""
    found = dict(parameters["parameters"])
    for name, behaviour in BEHAVIOUR_OF.items():
        seen = compatibility["behaviours"].get(behaviour)
        if seen is not None:
            refused = seen["observed"].startswith("HTTP ")
            effect = {"passed": True, "failed": None if refused else False}.get(seen["outcome"])
            found[name] = {"sent": {}, "effect": effect, "observed": seen["observed"]}
    return parameters | {"parameters": found}


def judge_ignored_parameters(
    incumbent: Evidence, candidate: Evidence, required_parameters: Sequence[str] = ()
) -> list[CheckResult]:
    """`parity.ignored_parameters`: those that the incumbent honours and the candidate does not.

    Gates only on `required_parameters`, the ones that the user's requests rely on; one of these that the incumbent
    does not honour either is no regression.
    """
    check, ours, theirs = "parity.ignored_parameters", incumbent["parameters"], candidate["parameters"]
    lost = [name for name, found in ours.items() if found["effect"] and not theirs.get(name, {}).get("effect")]
    gating = [name for name in lost if name in required_parameters]
    wanted = [name for name in required_parameters if name not in ours]
    if wanted:
        return [
            not_measured(
                check, f"no probe for {', '.join(wanted)}; known: {', '.join(ours)}", limit=0, unit="parameters"
            )
        ]
    unclear = [name for name in gating if theirs.get(name, {}).get("effect") is None]
    words = "; ".join(f"{name}: {theirs.get(name, {}).get('observed', 'not probed')}"[:100] for name in lost)
    why = f"honoured by the incumbent only: {words}" if lost else "all that the incumbent honours"
    required = bool(required_parameters)
    if not gating:
        verdict = Verdict.FAIL if lost and not required else Verdict.PASS
        value = len(gating) if required else len(lost)
        return [
            CheckResult(
                check=check, verdict=verdict, value=value, limit=0, unit="parameters", why=why, required=required
            )
        ]
    why = f"relied on: {', '.join(gating)}" + (f" ({len(unclear)} refused or unclear)" if unclear else "") + f"; {why}"
    return [at_most(check, len(gating), limit=0, unit="parameters", why=why)]
