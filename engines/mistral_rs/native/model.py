"""mistral.rs's `Runner` with one GGUF loaded: what goes in, what comes out, and the wheel's ways made good.

- its messages keep role and content alone (past tool calls vanish) and a stream cannot take a raw prompt: the chat
  template is rendered here, and the runner gets a template that passes a rendered prompt through;
- its JSON grammar lets a model write line breaks for ever (0.9.5): here it allows no white space between the parts;
- a fulfilled grammar lets a token through that need not end a text of this model: here that one is discouraged.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import sys
import tempfile
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.mistral_rs.native import requests, responses
from engines.mistral_rs.native.chat_template import ChatTemplate, Vocabulary
from engines.mistral_rs.native.requests import ApiError, Json
from engines.mistral_rs.native.responses import Piece
from engines.model.gguf import read_metadata, shard_paths

RENDERED = "rendered prompt"
# llguidance takes one of these that the vocabulary has as the end of a text (toktrie_hf_tokenizers, `from_tokenizer`)
TEXT_ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<eos>")
GRAMMAR_AT_FAULT = re.compile(r"Invalid grammar|(parser|lexer) error|NoExtensionBias")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One generation: a rendered prompt, how to sample, and the tools whose calls the engine shall recognise."""

    prompt: str
    sampling: requests.SamplingParameters
    tools: tuple[str, ...] = ()
    keeps_space: bool = False  # the text continues a prompt: a space at its beginning is part of it


def first_line(error: BaseException) -> str:
    """The first line of an error of the wheel; the rest is a Rust backtrace."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def on_cpu(force_cpu: bool) -> bool:
    """True when this wheel will compute on the CPU: forced to, or neither built for CUDA nor on macOS (Metal)."""
    return force_cpu or ("cuda" not in importlib.metadata.version("mistralrs") and sys.platform != "darwin")


def compact(schema: str) -> str:
    """The schema, which allows compact JSON only: `x-guidance` is llguidance's keyword, read at the root."""
    return json.dumps({"x-guidance": {"whitespace_flexible": False}} | json.loads(schema))


class LoadedModel:
    """A loaded mistral.rs runner with what the API needs to know about its text."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Load; raises what the wheel raises. Takes seconds to minutes and holds the global lock meanwhile."""
        gguf: Path = arguments.gguf
        metadata: dict[str, Any] = read_metadata(gguf)
        self.vocabulary = Vocabulary({} if arguments.tokenizer_json else metadata)
        source = arguments.chat_template.read_text() if arguments.chat_template else None
        self.template = ChatTemplate(source or metadata.get("tokenizer.chat_template", ""), Vocabulary(metadata))
        self._bos = Vocabulary(metadata).special("bos")
        self._lock = threading.Lock()
        self._runner = self._load(arguments)
        # Where a grammar is fulfilled the engine allows llguidance's end of text beside the model's own. If that one is
        # chosen and is none to the model, it is repeated unseen until the tokens are used up (0.9.5; SmolLM2,
        # `(yes|no)`): texts that obey a grammar get a bias against it.
        own = Vocabulary(metadata).special("eos")
        ends = [self.tokenize(end, False) for end in TEXT_ENDS if own and end != own]
        self._end_bias = {tokens[0]: -100.0 for tokens in ends if len(tokens) == 1}
        self.trained_context: int | None = self._runner.max_sequence_length()
        limits = [limit for limit in (arguments.context, self.trained_context) if limit]
        self.context = min(limits) if limits else 0

    def _load(self, arguments: argparse.Namespace) -> Any:
        from mistralrs import Runner, Which  # reads the environment at import

        extra: Json = {}
        if arguments.prefix_cache is not None:
            extra["prefix_cache_n"] = arguments.prefix_cache
        if arguments.seed is not None and not arguments.serial:
            extra["seed"] = arguments.seed
        # The model's own template stays in the text: the engine looks there for further end-of-turn tokens.
        passing = (
            f"{{% if messages[0]['role'] == '{RENDERED}' %}}{{{{ messages[0]['content'] }}}}"
            f"{{% else %}}{self.template.source}{{% endif %}}"
        )
        with tempfile.NamedTemporaryFile("w", suffix=".jinja", encoding="utf-8") as file:
            file.write(passing)
            file.flush()
            which: Any = Which.GGUF(
                # not resolved: a link, as in the Hugging Face cache, may be called otherwise than what it leads to
                quantized_model_id=str(arguments.gguf.absolute().parent),
                quantized_filename=[path.name for path in shard_paths(arguments.gguf)],
                tokenizer_json=str(arguments.tokenizer_json) if arguments.tokenizer_json else None,
            )
            return Runner(which=which, max_seqs=arguments.slots, jinja_explicit=file.name, **extra)

    def tokenize(self, text: str, add_special: bool) -> list[int]:
        with self._lock:
            tokens: list[int] = self._runner.tokenize_text(text, add_special, None)
        return tokens

    def detokenize(self, tokens: list[int]) -> str:
        """Text of token ids, special tokens included; ApiError 400 for ids outside the vocabulary."""
        size = len(self.vocabulary.tokens)
        if any(token < 0 or (size and token >= size) for token in tokens):
            raise requests.bad("tokens", f"must be ids of the vocabulary, 0 to {size - 1}")
        with self._lock:
            text: str = self._runner.detokenize_text(tokens, False)
        return text

    def count(self, prompt: str) -> int:
        """Tokens that the engine makes of a rendered prompt: it adds no second BOS."""
        return len(self.tokenize(prompt, not (self._bos and prompt.startswith(self._bos))))

    def open(self, job: Job, max_tokens: int) -> Any:
        """The wheel's iterator over chunks; dropping it frees the engine."""
        import mistralrs  # as above

        sampling, grammar = job.sampling, job.sampling.grammar
        text = None if grammar is None else grammar.text
        if grammar and grammar.kind == "json_schema":
            text = compact(grammar.text)
        request = mistralrs.ChatCompletionRequest(
            messages=[{"role": RENDERED, "content": job.prompt}],
            model="default",
            stream=True,
            max_tokens=max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p or None,
            top_k=1 if sampling.top_p == 0 else sampling.top_k,
            min_p=sampling.min_p,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            logit_bias=({**self._end_bias, **(sampling.logit_bias or {})} if grammar else sampling.logit_bias) or None,
            ignore_eos=sampling.ignore_eos,
            # With log-probabilities every token is a chunk; without, tokens that end no code point are not reported.
            logprobs=sampling.logprobs or bool(sampling.stop) or job.keeps_space,
            top_logprobs=sampling.top_logprobs,
            grammar=text,
            grammar_type=grammar.kind if grammar else None,
            tool_schemas=list(job.tools) or None,
            tool_choice=mistralrs.ToolChoice.Auto if job.tools else None,
        )
        with self._lock:
            return self._runner.send_chat_completion_request(request)

    def first_space(self, chunk: Any) -> str:
        """The white space at the beginning of a generation's first token, which the engine leaves out (0.9.5)."""
        logprob = chunk.choices[0].logprobs
        token = "" if logprob is None else str(self._logprob(logprob)["token"])
        content = chunk.choices[0].delta.content or ""
        return token[: len(token) - len(token.lstrip())] if not content[:1].isspace() else ""

    def piece(self, chunk: Any, wants_logprobs: bool) -> Piece:
        """One chunk of the wheel in neutral words; ApiError 500 for its finish reasons that are failures."""
        choice = chunk.choices[0]
        finish = choice.finish_reason
        if finish not in (None, "stop", "length", "tool_calls"):
            raise ApiError(500, f"the engine ended the generation: {finish}", type="server_error")
        content = choice.delta.content or ""
        if finish == "length":
            # The limit may fall inside a code point; its bytes so far would show as a replacement character.
            content = content.rstrip("\ufffd")
        return Piece(
            content=content,
            reasoning=choice.delta.reasoning_content or "",
            logprobs=(self._logprob(choice.logprobs),) if wants_logprobs and choice.logprobs else (),
            tool_calls=tuple(tool_call(call) for call in choice.delta.tool_calls or ()),
            finish=finish,
            usage=usage_of(chunk.usage) if chunk.usage else None,
        )

    def _logprob(self, logprob: Any) -> Json:
        chosen = bytes(logprob.bytes) if logprob.bytes is not None else logprob.token.encode()
        tops = [responses.token_entry(self._bytes(top), top.logprob, id=top.token) for top in logprob.top_logprobs]
        entry = responses.token_entry(chosen, logprob.logprob)
        same = next((top["id"] for top in tops if top["bytes"] == entry["bytes"]), None)
        return (entry if same is None else {"id": same} | entry) | {"top_logprobs": tops}

    def _bytes(self, top: Any) -> bytes:
        known = self.vocabulary.token_bytes(top.token)
        return known if known is not None else (top.bytes or "").encode()


def tool_call(call: Any) -> Json:
    function = {"name": call.function.name, "arguments": call.function.arguments}
    return {"index": call.index, "id": new_id("call_"), "type": "function", "function": function}


def usage_of(usage: Any) -> responses.Usage:
    """The wheel's usage in neutral words; its times are seconds."""
    details = getattr(usage, "prompt_tokens_details", None)
    return responses.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=getattr(details, "cached_tokens", None),
        prompt_ms=usage.total_prompt_time_sec * 1000,
        predicted_ms=usage.total_completion_time_sec * 1000,
    )


def new_id(prefix: str) -> str:
    return prefix + uuid.uuid4().hex[:24]


def engine_error(error: BaseException, job: Job, begun: bool) -> ApiError:
    """An error of the wheel as a client gets it: its first line, 400 when the request is to blame."""
    if isinstance(error, ApiError):
        return error
    reason = first_line(error)
    grammar = job.sampling.grammar
    if grammar and GRAMMAR_AT_FAULT.match(reason):
        return requests.bad(grammar.param, f"cannot be used: {reason}")
    if isinstance(error, UnicodeEncodeError):
        return ApiError(400, f"the text is no valid Unicode: {reason}")
    if not begun and ("must be" in reason or "empty prompt" in reason):
        return ApiError(400, reason)
    return ApiError(500, reason, type="server_error")
