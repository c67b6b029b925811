"""An OpenAI-style server in a thread, with no model in it: well behaved unless told a bad habit by name.

Its tokens are words; its greedy text follows from the prompt alone. `with stub("ignores stop") as base_url:`
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import select
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Json = dict[str, Any]

MODEL = "stub-model"
KEY = "sesame"
CONTEXT_TOKENS = 512
ENDLESS_TOKENS = 64
LEAVE_DEADLINE_S = 10.0
WORDS = [
    "fox", "river", "stone", "apple", "window", "garden", "silver", "yellow", "morning", "winter", "candle", "forest",
    "bridge", "letter", "music", "paper", "orange", "castle", "dragon", "flower", "pocket", "mirror", "summer",
    "kettle", "ladder", "button", "pencil", "basket", "hammer", "ticket",
]  # fmt: skip
KNOWN = {
    "model", "messages", "prompt", "temperature", "max_tokens", "max_completion_tokens", "stream", "stream_options",
    "stop", "seed", "top_p", "top_k", "logit_bias", "frequency_penalty", "presence_penalty", "n", "logprobs",
    "top_logprobs", "tools", "tool_choice", "parallel_tool_calls", "response_format", "ignore_eos",
}  # fmt: skip


class Refusal(Exception):
    """A request that the stub answers with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Stub(ThreadingHTTPServer):
    """The server and what it remembers."""

    daemon_threads = True

    def __init__(self, habits: frozenset[str], *, port: int = 0, handler: type[Handler] | None = None) -> None:
        super().__init__(("127.0.0.1", port), handler or Handler)
        self.habits = habits
        self.numbers = itertools.count(1)
        self.asked: Counter[str] = Counter()
        self.last_prompt = ""
        self.running = 0
        self.connections: set[Any] = set()
        self.upset = False

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """Close what clients keep open, as the end of a process does: its threads would answer on."""
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def stub(*habits: str) -> Iterator[str]:
    """The base URL of a running stub with `habits`; stopped when the block ends."""
    server = Stub(frozenset(habits))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        server.hang_up()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    # head and body in one packet: two would wait for each other's acknowledgement
    wbufsize = -1
    server: Stub

    def log_message(self, *_: object) -> None:
        """Nothing: tests stay quiet."""

    def bad(self, habit: str) -> bool:
        """Whether this stub has that habit."""
        return habit in self.server.habits

    def do_GET(self) -> None:
        routes: dict[str, tuple[str, Json]] = {
            "/health": ("no health", {"status": "ok"}),
            "/props": ("no props", {"default_generation_settings": {"n_ctx": CONTEXT_TOKENS}}),
            "/v1/models": ("", {"data": [{"id": "other" if self.bad("lists another model") else MODEL}]}),
        }
        habit, body = routes.get(self.path, ("", {}))
        if self.path == "/metrics" and not self.bad("no metrics"):
            self.reply(200, f"llamacpp:requests_processing {self.server.running}\n".encode(), "text/plain")
        elif body and not self.bad(habit):
            self.reply_json(200, body)
        else:
            self.refuse(Refusal(200 if self.bad("serves any route") else 404, "no such route"))

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("content-length", 0)))
        try:
            self.answer(raw)
        except Refusal as refusal:
            self.server.upset = True
            self.refuse(refusal)
        except OSError:
            self.close_connection = True

    def answer(self, raw: bytes) -> None:
        """Answer one POST; raises Refusal."""
        if self.headers.get("authorization") != f"Bearer {KEY}" and not self.bad("needs no key"):
            raise Refusal(401, "invalid key")
        try:
            body = json.loads(raw.decode("latin-1" if self.bad("reads latin-1") else "utf-8"))
        except ValueError as error:
            raise Refusal(500 if self.bad("500 on bad JSON") else 400, "not JSON") from error
        if self.path == "/tokenize" and not self.bad("no tokenize"):
            self.reply_json(200, {"tokens": list(range(len(body["content"].split())))})
        elif self.path == "/v1/completions":
            self.complete_text(body)
        elif self.path == "/v1/chat/completions":
            self.check(body)
            self.chat(body)
        else:
            raise Refusal(404, "no such route")

    def check(self, body: Json) -> None:
        """Raise Refusal for a request this stub does not serve."""
        if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
            raise Refusal(400, "messages must be a list")
        if not body["messages"]:
            if self.bad("200 on no messages"):
                raise Refusal(200, "no messages")
            raise Refusal(500 if self.bad("500 on no messages") else 400, "no messages")
        if not isinstance(body.get("temperature", 0), int | float) and not self.bad("takes any type"):
            raise Refusal(400, "temperature must be a number")
        if body.get("model") != MODEL and not self.bad("serves any model"):
            raise Refusal(404, "no such model")
        self.check_habits(body)
        schema = (body.get("response_format") or {}) if isinstance(body.get("response_format"), dict) else {}
        kind = schema.get("json_schema", {}).get("schema", {}).get("type", "object")
        if kind != "object" and not self.bad("takes any schema"):
            raise Refusal(400, "no such type in the schema")
        if len(self.prompt(body).split()) > CONTEXT_TOKENS and not self.bad("truncates"):
            if body.get("stream") and self.bad("refuses late"):
                self.events([{"error": {"message": "the prompt exceeds the context"}}])
                raise OSError
            raise Refusal(400, "the prompt exceeds the context")

    def check_habits(self, body: Json) -> None:
        """Raise the refusals that only bad habits bring."""
        refusals = {
            "refuses unknown fields": bool(set(body) - KNOWN),
            "four stops at most": isinstance(body.get("stop"), list) and len(body["stop"]) > 4,
            "refuses a large max_tokens": (body.get("max_tokens") or 0) > CONTEXT_TOKENS,
            "refuses tools": "tools" in body,
            "refuses null content": any(turn.get("content") is None for turn in body["messages"]),
            "refuses n": body.get("n", 1) > 1,
            "breaks on equal lengths": "Tell me about" in str(body["messages"])
            and self.server.asked[self.prompt(body)] > 0,
        }
        for habit, applies in refusals.items():
            if applies and self.bad(habit):
                raise Refusal(422, habit)

    def prompt(self, body: Json) -> str:
        """The rendered prompt: its words are its tokens."""
        dropped = {role for role in ("system", "developer", "assistant", "tool") if self.bad(f"drops {role}")}
        lines = [json.dumps(tool) for tool in body.get("tools", []) if not self.bad("drops tools")]
        for turn in body["messages"]:
            if turn["role"] not in dropped:
                content = turn.get("content")
                if isinstance(content, list) and not self.bad("prints content parts"):
                    content = "".join(part["text"] for part in content)
                lines.append(f"{turn['role']}: {content or ''} {json.dumps(turn.get('tool_calls', ''))}")
        return "\n".join(lines)

    # what the model would say

    def sampled(self, body: Json) -> bool:
        """Whether this request is answered by chance."""
        if not body.get("temperature") or self.bad("ignores temperature"):
            return False
        narrow = (body.get("top_k") == 1 and not self.bad("ignores top_k")) or (
            body.get("top_p", 1) < 0.01 and not self.bad("ignores top_p")
        )
        return not narrow

    def tokens(self, body: Json) -> Iterator[str]:
        """The answer's tokens, endless unless the model ends by itself."""
        prompt, last = self.prompt(body), str(body["messages"][-1].get("content"))
        text = self.forced(body)
        if text is not None:
            return iter(text[place : place + 3] for place in range(0, len(text), 3))
        if last.startswith("Repeat: "):
            return iter(last.removeprefix("Repeat: "))
        if last.startswith(("Count:", "Say:", "What is 2")):
            ending = iter(["that", " is", " four"] + ["<|im_end|>"] * self.bad("shows markers"))
            return itertools.chain(ending, self.words(body, prompt)) if self.eos_ignored(body) else ending
        penalised = body.get("frequency_penalty") or body.get("presence_penalty")
        if last.startswith("Sing: la") and (not penalised or self.bad("ignores penalties")):
            return itertools.repeat("la ")
        return self.words(body, self.mixed(prompt))

    def eos_ignored(self, body: Json) -> bool:
        return bool(body.get("ignore_eos")) and not self.bad("ignores ignore_eos")

    def forced(self, body: Json) -> str | None:
        """The text that response_format forces, if it does."""
        wanted = body.get("response_format")
        if not isinstance(wanted, dict) or (body.get("stream") and self.bad("ignores schema in streams")):
            return None
        if wanted.get("type") == "json_object" and not self.bad("ignores json_object"):
            return '{"colour": "red"}'
        if wanted.get("type") == "json_schema" and not self.bad("ignores schema"):
            properties = wanted["json_schema"]["schema"].get("properties", {"code": {"enum": ["none"]}})
            return json.dumps({"code": properties["code"]["enum"][0]}, ensure_ascii=False)
        return None

    def mixed(self, prompt: str) -> str:
        """`prompt`, or with a bad habit the one before it, once it has been asked already."""
        before, self.server.last_prompt = self.server.last_prompt, prompt
        self.server.asked[prompt] += 1
        if self.bad("mixes answers") and self.server.asked[prompt] > 1:
            return before
        changed = self.bad("never repeats itself") or (self.bad("errors leave traces") and self.server.upset)
        return f"{prompt} {next(self.server.numbers)}" if changed else prompt

    def words(self, body: Json, prompt: str) -> Iterator[str]:
        """Words without end; the same ones for the same prompt unless sampled."""
        chance = ""
        if self.sampled(body):
            chance = str(next(self.server.numbers))
            if body.get("seed") is not None and not self.bad("ignores seed"):
                chance = f"seed {body['seed']}"
        banned = set() if self.bad("ignores logit_bias") else {int(key) for key in body.get("logit_bias", {})}
        generator, first = random.Random(prompt + chance), True
        while True:
            for word in generator.sample(WORDS, len(WORDS)):
                if WORDS.index(word) not in banned:
                    yield word if first else f" {word}"
                    first = False

    def limit(self, body: Json) -> int:
        """How many tokens may come; ENDLESS_TOKENS when nothing limits them."""
        if "max_completion_tokens" in body and not self.bad("ignores max_completion_tokens"):
            return body["max_completion_tokens"]
        if "max_tokens" in body and not self.bad("ignores max_tokens"):
            return min(body["max_tokens"], CONTEXT_TOKENS)
        return ENDLESS_TOKENS

    def generate(self, body: Json) -> tuple[list[str], str]:
        """The answer's tokens, cut by limit and stop strings, with the finish reason."""
        source, limit = self.tokens(body), self.limit(body)
        tokens = list(itertools.islice(source, limit))
        finish = "length" if len(tokens) == limit else "stop"
        wanted = body.get("stop") or []
        stops = [wanted] if isinstance(wanted, str) else wanted
        if self.bad("reads the first stop only"):
            stops = stops[:1]
        if self.bad("ignores stop") or (body.get("stream") and self.bad("ignores stop in streams")):
            stops = []
        text = "".join(tokens)
        cuts = [text.find(stop) for stop in stops if stop in text]
        if cuts:
            return [text[: min(cuts)]], "stop"
        return tokens, finish

    def calls(self, body: Json) -> list[Json]:
        """The tool calls the answer consists of; empty when it is text."""
        choice, tools = body.get("tool_choice", "auto"), body.get("tools", [])
        names = [tool["function"]["name"] for tool in tools]
        habitual = any(turn.get("tool_calls") for turn in body["messages"])
        habitual = habitual and "weather in Paris" in str(body["messages"][-1])
        forced = choice == "required" or isinstance(choice, dict)
        if forced and self.bad("ignores tool_choice"):
            forced = False
        if not names or not (forced or habitual) or (choice == "none" and not self.bad("calls anyway")):
            return []
        name = choice["function"]["name"] if isinstance(choice, dict) else names[0]
        arguments = '{"city": "Par' if self.bad("cuts arguments") else '{"city": "Paris"}'
        arguments = "[" * 5000 if self.bad("nests arguments") else arguments
        one = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}
        return [one, one | {"id": "call_2"}] if self.bad("calls twice") else [one]

    # answers

    def chat(self, body: Json) -> None:
        """Serve a chat request, complete or streamed."""
        prompt_tokens = len(self.prompt(body).split())
        if self.bad("truncates"):
            prompt_tokens = min(prompt_tokens, 64)
        calls = self.calls(body)
        tokens, finish = self.generate(body) if not calls else ([], "tool_calls")
        if calls and self.bad("leaves calls in the text"):
            tokens, finish, calls = ["<tool_call>", json.dumps(calls[0]["function"]), "</tool_call>"], "stop", []
        used = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": len(tokens),
            "total_tokens": prompt_tokens + len(tokens) + self.bad("adds up wrong"),
        }
        abandoned = "very long story" in str(body["messages"])
        if abandoned:
            self.server.running += 1
        if body.get("stream"):
            self.events(self.chunks(body, tokens, finish, calls, used), abandoned=abandoned)
            return
        if abandoned:
            self.wait_until_left("keeps running after a plain leave")
            return
        self.complete(body, tokens, finish, calls, used)

    def complete(self, body: Json, tokens: list[str], finish: str, calls: list[Json], used: Json) -> None:
        """Send a complete chat answer."""
        message: Json = {"role": "bot" if self.bad("is a bot") else "assistant", "content": "".join(tokens)}
        if calls:
            message |= {"content": None, "tool_calls": calls}
        choice = {"index": 0, "message": message, "finish_reason": finish}
        if body.get("logprobs"):
            choice["logprobs"] = {"content": self.logprobs(tokens, body)}
        number = 1 if self.bad("ignores n") else body.get("n", 1)
        answer = self.envelope("chat.completion") | {"choices": [choice] * number, "usage": used}
        self.reply_json(200, answer)

    def envelope(self, kind: str) -> Json:
        """The fields around an answer."""
        number = 0 if self.bad("has one id") else next(self.server.numbers)
        name = "some-model" if self.bad("names another model") else MODEL
        return {"id": f"chatcmpl-{number}", "object": kind, "created": 1_700_000_000, "model": name}

    def logprobs(self, tokens: list[str], body: Json) -> list[Json]:
        """One entry a token, with the alternatives asked for."""
        entries = []
        for token in tokens:
            name: object = 7 if self.bad("gives token numbers") else token
            top = [{"token": word, "logprob": value} for word, value in ((token, -0.5), ("la", -1.5), ("le", -2.5))]
            if self.bad("gives unsorted alternatives"):
                top.reverse()
            identity = WORDS.index(token.strip()) if token.strip() in WORDS else 0
            entries.append(
                {"id": identity, "token": name, "logprob": -0.5, "top_logprobs": top[: body.get("top_logprobs", 0)]}
            )
        return entries

    def chunks(self, body: Json, tokens: list[str], finish: str, calls: list[Json], used: Json) -> list[Json]:
        """The events of a streamed answer, [DONE] left out."""
        head = self.envelope("chunk" if self.bad("names no chunks") else "chat.completion.chunk")
        # the bad habit a byte-wise detokenizer has: every piece that cuts a character is spoilt
        if self.bad("spoils wide characters"):
            tokens = [token.encode("ascii", "replace").decode().replace("?", "�") for token in tokens]
        if self.bad("streams all at once"):
            tokens = ["".join(tokens)]
        if self.bad("loses the last piece"):
            tokens = tokens[:-1]
        opening = {} if self.bad("opens without a role") else {"role": "assistant", "content": ""}
        deltas: list[Json] = [opening, *({"content": token} for token in tokens), *call_deltas(calls)]
        if self.bad("sends arguments as objects"):
            deltas = [
                opening,
                {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": {"city": "Paris"}}}]},
            ]
        choices: list[Json] = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
        if body.get("logprobs") and not self.bad("streams no logprobs"):
            for choice, token in zip(choices[1:], tokens, strict=False):
                choice["logprobs"] = {"content": self.logprobs([token], body)}
        ends = [{"index": 0, "delta": {}, "finish_reason": finish}] * (2 if self.bad("finishes twice") else 1)
        events = [head | {"choices": [choice]} for choice in [*choices, *ends]]
        if self.bad("changes ids"):
            events = [event | {"id": f"id-{place}"} for place, event in enumerate(events)]
        asked = (body.get("stream_options") or {}).get("include_usage") and not self.bad("streams no usage")
        if asked or self.bad("always streams usage"):
            events.append(head | {"choices": [], "usage": used})
        return events

    def events(self, events: list[Json], *, abandoned: bool = False) -> None:
        """Send an event stream; an abandoned one stays open until the client leaves."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in events[:8] if abandoned else events:
            self.send_piece(f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode())
        if abandoned:
            self.wfile.flush()
            self.wait_until_left("keeps running after a leave")
            return
        if not self.bad("never says done"):
            self.send_piece(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def send_piece(self, piece: bytes) -> None:
        """Send one HTTP chunk."""
        self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))

    def wait_until_left(self, habit: str) -> None:
        """Return when the client has closed the connection; the habit leaves the request running."""
        readable, _, _ = select.select([self.connection], [], [], LEAVE_DEADLINE_S)
        self.close_connection = True
        if readable and not self.bad(habit):
            self.server.running -= 1

    def complete_text(self, body: Json) -> None:
        """Serve /v1/completions."""
        text = "" if self.bad("completes nothing") else " little fox"
        chat = self.prompt({"messages": [{"role": "user", "content": body["prompt"]}]})
        read = chat if self.bad("completes as a chat") else body["prompt"]
        used = {"prompt_tokens": len(read.split()), "completion_tokens": 2}
        self.reply_json(200, {"choices": [{"index": 0, "text": text, "finish_reason": "length"}], "usage": used})

    def refuse(self, refusal: Refusal) -> None:
        """Send an error."""
        error: Json = {"message": str(refusal), "type": "invalid_request_error", "code": refusal.status}
        self.reply_json(refusal.status, error if self.bad("has bare errors") else {"error": error})

    def reply_json(self, status: int, body: Json) -> None:
        self.reply(status, json.dumps(body).encode(), "application/json")

    def reply(self, status: int, body: bytes, content_type: str) -> None:
        """Send a complete answer."""
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        if self.bad("closes connections"):
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(body)


def call_deltas(calls: list[Json]) -> Iterator[Json]:
    """Tool calls as stream pieces: id and name first, then the arguments in two parts."""
    for index, call in enumerate(calls):
        function, middle = call["function"], len(call["function"]["arguments"]) // 2
        head = {"name": function["name"], "arguments": ""}
        yield {"tool_calls": [{"index": index, "id": call["id"], "type": "function", "function": head}]}
        for part in (function["arguments"][:middle], function["arguments"][middle:]):
            yield {"tool_calls": [{"index": index, "function": {"arguments": part}}]}
