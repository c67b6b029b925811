"""What every behaviour of the battery is made of: how it is declared, how it asks, and what it returns.

A 200 is not support: an engine that silently drops `stop`, `seed` or `tools` still answers 200. So every behaviour
compares the answer with what the parameter had to change. The prompts need no clever model: expected texts are taken
from the engine's own greedy answers, or forced by a grammar.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from engines.units import number_of
from tasks.evidence.behaviours.caller import ApiReply, Caller, Json, Messages, Streamed, user

Kind = Literal["passed", "failed", "not_applicable", "errored"]
Group = Literal[
    "chat", "stream", "usage", "stop", "limits", "sampling", "logprobs", "tools", "json",
    "unicode", "errors", "cancel", "concurrency", "models", "security",
]  # fmt: skip
Probe = Callable[["Asker"], "Observation"]


@dataclass(frozen=True)
class Observation:
    """What one behaviour did: its outcome, and a short text of what was seen."""

    outcome: Kind
    observed: str


@dataclass(frozen=True)
class Behaviour:
    """One behaviour of the API: `probe` asks an engine; `required` behaviours are those a tool-calling agent needs."""

    group: Group
    claim: str
    probe: Callable[[Asker], Observation]
    required: bool = False


def behaviour(group: Group, claim: str, *, required: bool = False) -> Callable[[Probe], Behaviour]:
    """Makes a Behaviour of a function."""
    return lambda probe: Behaviour(group, claim, probe, required)


class NotApplicable(Exception):
    """The claim cannot be tried on this engine or model, for the reason given."""


def passed(observed: str) -> Observation:
    """The claim holds."""
    return Observation("passed", observed)


def failed(observed: str) -> Observation:
    """The claim does not hold."""
    return Observation("failed", observed)


def holds(claim: bool, observed: str) -> Observation:
    """`passed` or `failed`, with the same text either way."""
    return Observation("passed" if claim else "failed", observed)


COMMON = "Tell me a story."
COMMON_TOKENS = 12
ENDING = ("Count: one, two, three,", "Say: ok", "What is 2 + 2? Answer with one number.")
ENDING_TOKENS = 24
MARKERS = re.compile(r"<\|?[a-z_]*(?:im_end|im_start|eot|end_of_turn|endoftext)[a-z_]*\|?>|</s>")
REPEATING: list[Json] = [
    user("Sing: la"), {"role": "assistant", "content": "la la la la la la"},
    user("Sing: la"),
]  # fmt: skip
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather in a city", "parameters": CITY},
}
CLOCK = {"type": "function", "function": {"name": "get_time", "description": "The time in a city", "parameters": CITY}}
WEATHER_QUESTION = "What is the weather in Paris?"
CALL_TOKENS = 48


class Asker(Caller):
    """A caller that keeps the answers which several behaviours read, so that each is generated once."""

    def common(self, **params: Any) -> ApiReply:
        """The answer to the common prompt, greedy unless `params` say otherwise."""
        return self.chat(COMMON, max_tokens=COMMON_TOKENS, **params)

    @cached_property
    def plain(self) -> ApiReply:
        """The greedy answer to the common prompt, complete."""
        return self.common().served()

    @cached_property
    def bare_stream(self) -> Streamed:
        """The same answer, streamed, without asking for usage."""
        return self.stream(COMMON, max_tokens=COMMON_TOKENS).served()

    @cached_property
    def usage_stream(self) -> Streamed:
        """The same answer, streamed, asking for usage."""
        return self.stream(COMMON, max_tokens=COMMON_TOKENS, stream_options={"include_usage": True}).served()

    @cached_property
    def chunk_gap_s(self) -> float:
        """The mean gap between two content chunks of an undisturbed stream, in seconds; 0 for a single chunk."""
        arrivals = self.bare_stream.arrivals_s
        return (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1) if len(arrivals) > 1 else 0.0

    @cached_property
    def context_tokens(self) -> int | None:
        """The context of one sequence: by the endpoint, else by llama.cpp's /props or vLLM's model list."""
        if self.endpoint.context_tokens is not None:
            return self.endpoint.context_tokens
        props = self.get("/props").body
        settings = props.get("default_generation_settings") if isinstance(props, dict) else None
        if isinstance(settings, dict) and isinstance(settings.get("n_ctx"), int):
            return int(settings["n_ctx"])
        models = self.get("/v1/models").body
        listed = models.get("data") if isinstance(models, dict) else None
        return next((entry["max_model_len"] for entry in listed or [] if entry.get("max_model_len")), None)

    @property
    def ending(self) -> tuple[str, ApiReply]:
        """The first prompt whose greedy answer ends by itself within the limit, with that answer."""
        if self._ending is None:
            raise NotApplicable(f"no answer to {number_of(len(ENDING), 'prompt')} ended within {ENDING_TOKENS} tokens")
        return self._ending

    @cached_property
    def _ending(self) -> tuple[str, ApiReply] | None:
        for prompt in ENDING:
            reply = self.chat(prompt, max_tokens=ENDING_TOKENS)
            if reply.finish == "stop" or MARKERS.search(reply.text):
                return prompt, reply
        return None

    @cached_property
    def repeating(self) -> ApiReply:
        """The greedy answer to a repeating prompt."""
        return self.chat(REPEATING, max_tokens=16)

    @cached_property
    def tool_growth(self) -> int:
        """By how many tokens the prompt grows when a tool is offered; 0 when the template cannot show tools."""
        return self.prompt_tokens(WEATHER_QUESTION, tools=[WEATHER]) - self.prompt_tokens(WEATHER_QUESTION)

    def require_tools(self) -> None:
        """Raises NotApplicable when the template shows no tools to the model."""
        if self.tool_growth <= 0:
            grown = self.tool_growth
            raise NotApplicable(f"prompt tokens grow by {grown} when a tool is offered: the template shows none")

    @cached_property
    def calling(self) -> tuple[list[Json], ApiReply]:
        """A conversation that makes the model call a tool, if one of two does, and the greedy answer to it."""
        for answered in (False, True):
            turns = weather_turns(answered=answered)
            reply = self.chat(turns, tools=[WEATHER, CLOCK], tool_choice="auto", max_tokens=CALL_TOKENS)
            if reply.status == 200 and (reply.tool_calls or leaks_call(reply.text)):
                break
        return turns, reply.served()

    def prompt_tokens(self, messages: Messages, **params: Any) -> int:
        """Tokens of the rendered prompt, as the engine counts them."""
        return self.chat(messages, **({"max_tokens": 1} | params)).used("prompt_tokens")


def refusal(reply: ApiReply) -> str:
    """The status of a refusal, whether its body has an `error` object, and its words; or the text that was served."""
    if reply.status == 200 and isinstance(reply.body, dict) and reply.body.get("choices"):
        return f"served {reply.text!r}"
    shape = "error body" if reply.error else "no error object"
    return f"HTTP {reply.status}, {shape}: {reply.error_text}"


def call(city: str, call_id: str) -> Json:
    """An assistant turn that calls get_weather for `city`."""
    function = {"name": "get_weather", "arguments": json.dumps({"city": city})}
    return {
        "role": "assistant", "content": None,
        "tool_calls": [{"id": call_id, "type": "function", "function": function}],
    }  # fmt: skip


def result(text: str, call_id: str) -> Json:
    """A tool turn that answers the call `call_id`."""
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def weather_turns(*, answered: bool) -> list[Json]:
    """A conversation with two calls made before, which lets a small model make the third by copying.

    `answered` puts a result after each call, as OpenAI's API demands; without results more models copy.
    """
    turns: list[Json] = []
    for city, weather, call_id in (("Oslo", "rain", "call00001"), ("Rome", "sun", "call00002")):
        turns += [user(f"What is the weather in {city}?"), call(city, call_id)]
        turns += [result(weather, call_id)] if answered else []
    return [*turns, user(WEATHER_QUESTION)]


def leaks_call(text: str) -> bool:
    """Whether `text` holds the markup of a call that the engine should have parsed."""
    return "tool_call" in text or '"arguments"' in text
