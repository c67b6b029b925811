"""Sampling parameters that an engine accepts and ignores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import httpx

from engines.settings import Endpoint
from engines.units import number_of
from tasks.evidence.behaviours.caller import Caller, Malformed, Refused
from tasks.evidence.parity.asking import TIMEOUT_S, Evidence, Progress, origin
from tasks.verdicts.verdict import CheckResult, at_most, not_measured

QUESTION = "Write a short story about a lighthouse and its keeper."


def measure_ignored_parameters(endpoint: Endpoint, *, progress: Progress = lambda _: None) -> Evidence:
    """For parameters beyond OpenAI's: what was sent, whether it had its effect (None: cannot say), and what was seen.

    OpenAI's own are among the compatibility battery's behaviours: `with_behaviours` adds them. A 200 proves nothing:
    engines drop parameters they do not know. So each probe sends one parameter and looks for what it must change. A
    refusal is not silence: effect None, and its text. Whether a probe can show an effect depends on the model, so the
    incumbent's result is the yardstick.
    """
    found: Evidence = {}
    with _Prober(endpoint, read_timeout_s=TIMEOUT_S) as prober:
        for name, (probe, value) in _PROBES.items():
            sent = {name: value}
            try:
                effect, observed = probe(prober, sent)
            except (httpx.HTTPError, Refused, Malformed) as error:
                effect, observed = None, f"{'' if isinstance(error, Refused) else type(error).__name__ + ': '}{error}"
            found[name] = {"sent": sent, "effect": effect, "observed": observed}
            words = {True: "took effect", False: "had no effect", None: "cannot say"}[effect]
            progress(f"{endpoint.engine}: parameter {name}: {words}")
    return origin(endpoint) | {"parameters": found}


class _Prober(Caller):
    """Asks one engine the same question with one parameter changed; greedy unless `sent` says otherwise."""

    def text(self, **sent: Any) -> str:
        return self.chat(QUESTION, **{"max_tokens": 16, **sent}).text

    @cached_property
    def greedy(self) -> str:
        return self.text()

    @cached_property
    def longer(self) -> str:
        """The greedy text, long enough for words to repeat."""
        return self.text(max_tokens=40)


def _changes_greedy(prober: _Prober, sent: Evidence) -> tuple[bool | None, str]:
    """Whether `sent` changes a greedy text in which words repeat."""
    plain, text = prober.longer, prober.text(max_tokens=40, **sent)
    return plain != text, f"without {plain[-40:]!r}, with {text[-40:]!r}"


def _makes_greedy(prober: _Prober, sent: Evidence) -> tuple[bool | None, str]:
    """Whether `sent` leaves only the best token at a high temperature."""
    if prober.text(temperature=2.0, seed=11) == prober.greedy:
        return None, "a high temperature alone changes nothing here"
    text = prober.text(temperature=2.0, seed=11, **sent)
    return text == prober.greedy, f"greedy {prober.greedy[:40]!r}, got {text[:40]!r}"


_PROBES: dict[str, tuple[Callable[[_Prober, Evidence], tuple[bool | None, str]], float]] = {
    "repeat_penalty": (_changes_greedy, 1.8),
    "repetition_penalty": (_changes_greedy, 1.8),
    "min_p": (_makes_greedy, 0.999),
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
    """What `measure_ignored_parameters` found, with what the compatibility battery's behaviours prove."""
    found = dict(parameters["parameters"])
    for name, behaviour in BEHAVIOUR_OF.items():
        seen = compatibility["behaviours"].get(behaviour)
        if seen is not None:
            refused = seen["observed"].startswith("HTTP ")
            effect = {"passed": True, "failed": None if refused else False}.get(seen["outcome"])
            found[name] = {"sent": {}, "effect": effect, "observed": seen["observed"]}
    return parameters | {"parameters": found}


def judge_fields(used: Evidence, incumbent: Evidence | None, candidate: Evidence | None) -> CheckResult:
    """`compatibility.fields_in_use`: request fields that clients send, and that only the candidate does not act on.

    `used` has what clients send and what an engine is known to leave alone; the engines' parameters add what a probe
    found without effect. It holds no gate: whether an answer needs the field only its client knows.
    """
    check, counts, known = "compatibility.fields_in_use", used["used"], used["ignored"]
    if not counts:
        return not_measured(check, "no field that clients send was counted", limit=0, unit="fields", required=False)
    ignored = set(known["candidate"]) - set(known["incumbent"])
    ours, theirs = (({} if found is None else found["parameters"]) for found in (incumbent, candidate))
    silent = {name for name, found in ours.items() if found["effect"] and theirs.get(name, {}).get("effect") is False}
    ignored |= {name.partition(".")[0] for name in silent} & set(counts)
    why = f"clients send {requests({name: counts[name] for name in ignored})}: the candidate does not act on it"
    if not ignored:
        why = f"none of the {number_of(len(counts), 'field')} that clients send is known to be ignored"
    result = at_most(check, len(ignored), limit=0, unit="fields", why=why)
    return result.model_copy(update={"required": False})


def requests(counts: Mapping[str, int]) -> str:
    """`mirostat (12 requests), n_probs (3 requests)`, the most frequent first."""
    return ", ".join(
        f"{name} ({number_of(n, 'request')})" for name, n in sorted(counts.items(), key=lambda item: -item[1])
    )


def judge_ignored_parameters(
    incumbent: Evidence, candidate: Evidence, required_parameters: Sequence[str] = ()
) -> list[CheckResult]:
    """`parity.ignored_parameters`: those that the incumbent honours and the candidate does not.

    Gates only on `required_parameters`, the ones that the user's requests rely on; one of these that the incumbent
    does not honour either is no regression; one that was not probed on the candidate leaves it open.
    """
    check, ours, theirs = "parity.ignored_parameters", incumbent["parameters"], candidate["parameters"]
    if wanted := [name for name in required_parameters if name not in ours]:
        why = f"no probe for {', '.join(wanted)}; known: {', '.join(ours) or 'none'}"
        return [not_measured(check, why, limit=0, unit="parameters")]
    if absent := [name for name in required_parameters or ours if name not in theirs]:
        why = f"not probed on the candidate: {', '.join(absent)}"
        return [not_measured(check, why, limit=0, unit="parameters", required=bool(required_parameters))]
    if not ours:
        return [not_measured(check, "no parameter was probed", limit=0, unit="parameters", required=False)]
    lost = [name for name, found in ours.items() if found["effect"] and not theirs.get(name, {}).get("effect")]
    gating = [name for name in lost if name in required_parameters]
    words = "; ".join(f"{name}: {theirs.get(name, {}).get('observed', 'not probed')}"[:100] for name in lost)
    why = f"honoured by the incumbent only: {words}" if lost else "all that the incumbent honours"
    if gating:
        unclear = [name for name in gating if theirs.get(name, {}).get("effect") is None]
        note = f" ({len(unclear)} refused or unclear)" if unclear else ""
        why = f"relied on: {', '.join(gating)}{note}; {why}"
        return [at_most(check, len(gating), limit=0, unit="parameters", why=why)]
    required = bool(required_parameters)
    result = at_most(check, 0 if required else len(lost), limit=0, unit="parameters", why=why)
    return [result.model_copy(update={"required": required})]
