"""A process that behaves as `mistralrs serve` 0.8.1 and 0.9 do, around a model of a few fixed words.

python tests/rig/mistralrs_stub.py [--stub-version 0.9.2] serve --host 127.0.0.1 -p 8099 --format gguf -m DIR -f FILE

0.8.1 as the program itself did: tests/engines/mistral_rs/test_program.py asks both the same. 0.9 as read at v0.9.2 and
the commit after it that made stream errors JSON: `mistralrs-server-core/src/{openai,chat_completion,completions,
handler_core,streaming}.rs`, `mistralrs-core/src/{response.rs,pipeline/sampling.rs,engine/add_request.rs}`.

What it says depends on the last message alone:

- "call": the one tool call of the first tool; "fail midway": an error behind two tokens; else WORDS;
- "slow": a keep-alive comment before all else, as after ten seconds without a token;
- more than CONTEXT words in all messages: too long a prompt.
"""

import argparse
import json
import math
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

WORDS = ["Hello", " there", ",", " friend", "."]
CONTEXT = 64
HELP = "--host --port --model-id --format --quantized-file --max-seqs --cpu --seed --token-source --pa-context-len"
SINCE_09 = " --no-ui --max-num-batched-tokens"
# serde's type of what a chat request may hold; a bool cannot be null, an Option can
TYPES = {
    "model": (str,),
    "logprobs": (bool,),
    "top_logprobs": (int, None),
    "max_tokens": (int, None),
    "n": (int,),
    "temperature": (int, float, None),
    "top_p": (int, float, None),
    "min_p": (int, float, None),
    "top_k": (int, None),
    "repetition_penalty": (int, float, None),
    "stream": (bool, None),
    "ignore_eos": (bool,),
    "logit_bias": (dict, None),
    "grammar": (dict, None),
    "response_format": (dict, None),
    "tool_choice": (str, dict, None),
    "tools": (list, None),
}


class Refused(Exception):
    """A status with the body of a JSON error, or axum's own plain text."""

    def __init__(self, status: int, message: str, *, plain: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.plain = plain


def deserialize(raw: bytes, chat: bool) -> dict:
    """The body as serde would take it; Refused with axum's words."""
    duplicates = []

    def pairs(found: list[tuple[str, object]]) -> dict:
        names = ["max_tokens" if name == "max_completion_tokens" else name for name, _ in found]
        duplicates.extend(name for name in ("max_tokens",) if names.count(name) > 1)
        return dict(zip(names, (value for _, value in found), strict=True))

    try:
        body = json.loads(raw, object_pairs_hook=pairs)
    except ValueError as error:
        raise Refused(400, f"Failed to parse the request body as JSON: {error}", plain=True) from None
    why = f"duplicate field `{duplicates[0]}`" if duplicates else wrong_type(body, chat)
    if why:
        raise Refused(422, f"Failed to deserialize the JSON body into the target type: {why}", plain=True)
    return body


def wrong_type(body: dict, chat: bool) -> str | None:
    types = TYPES | ({} if chat else {"logprobs": (int, None), "prompt": (str,)})
    for name, allowed in types.items():
        value = body.get(name, ...)
        if value is ...:
            continue
        if value is None:
            fits = None in allowed
        elif isinstance(value, bool):
            fits = bool in allowed
        else:
            fits = isinstance(value, tuple(kind for kind in allowed if kind))
        if not fits:
            return f"{name}: invalid type: {value!r}"
        if isinstance(value, int) and value < 0 and name in ("max_tokens", "top_k", "n"):
            return f"{name}: invalid value: integer `{value}`, expected usize"
        if name == "tool_choice" and isinstance(value, str) and value not in ("none", "auto"):
            return "tool_choice: data did not match any variant of untagged enum ToolChoice"
        if name == "response_format" and value and value.get("type") not in ("text", "json_schema"):
            return f"response_format.type: unknown variant `{value.get('type')}`, expected `text` or `json_schema`"
    needed = "messages" if chat else "prompt"
    if not isinstance(body.get(needed), list | str):
        return f"missing field `{needed}`"
    return None


def checked(body: dict, chat: bool, old: bool) -> None:
    """What parse_request looks at: its errors are 500, whoever is at fault."""
    if body.get("model", "default") not in ("default", Handler.name):
        raise Refused(500, f"Requested model '{body['model']}' is not available. Available models: {Handler.name}.")
    if body.get("n") == 0:
        raise Refused(422, "Number of choices must be greater than 0.")
    if "grammar" in body and "response_format" in body:
        raise Refused(500, "Request `grammar` and `response_format` were both provided but are mutually exclusive.")
    for message in body["messages"] if chat else []:
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            raise Refused(500, "No content was provided, expected tool calls to be provided.")
        if not old and isinstance(content, list) and message["role"] != "user":
            raise Refused(500, f"Role for an image message must be `user`, but it is {message['role']}")


def invalid(words: list[str], body: dict, old: bool) -> str | None:
    """What the engine itself refuses."""
    if not words:
        return "Received an empty prompt."
    if body.get("max_tokens") == 0 and not old:
        return "max_tokens must be at least 1."
    if len(words) > CONTEXT:
        return f"Prompt sequence length is greater than {CONTEXT}, perhaps consider using `truncate_sequence`?"
    return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    name = "DIR"
    json_errors = old = False
    count = 0

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, data: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.path == "/health":
            self.reply(200, b"OK", "text/plain; charset=utf-8")
        elif self.path == "/metrics" and not self.old:
            text = f"mistralrs_tokens_processed_total {Handler.count}\n"
            self.reply(200, text.encode(), "text/plain; version=0.0.4")
        elif self.path == "/v1/models":
            about = {"object": "model", "created": int(time.time()), "owned_by": "local"}
            models = [{"id": "default", **about}, {"id": self.name, **about, "status": "loaded"}]
            self.reply(200, json.dumps({"object": "list", "data": models}).encode())
        else:
            self.reply(404, b"")

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path not in ("/v1/chat/completions", "/v1/completions"):
            self.reply(404, b"")
            return
        if self.headers.get("Content-Type") != "application/json":
            self.reply(415, b"Expected request with `Content-Type: application/json`", "text/plain; charset=utf-8")
            return
        try:
            self.generate(deserialize(raw, "chat" in self.path), "chat" in self.path)
        except Refused as refused:
            if refused.plain:
                self.reply(refused.status, str(refused).encode(), "text/plain; charset=utf-8")
            else:
                self.reply(refused.status, json.dumps({"message": str(refused)}).encode())

    def generate(self, body: dict, chat: bool) -> None:
        checked(body, chat, self.old)
        said = [text_of(message) for message in body["messages"]] if chat else [body["prompt"]]
        words = " ".join(said).split()
        refusal = invalid(words, body, self.old)
        if refusal and not body.get("stream"):
            raise Refused(422, refusal)
        limit = body.get("max_tokens")
        made = WORDS[: len(WORDS) if limit is None else limit or 1]
        finish = "length" if len(made) < len(WORDS) else "stop"
        calls = None
        if said[-1] == "call" and body.get("tools"):
            calls, finish, made = [call(body["tools"][0])], "tool_calls", [""]
        Handler.count += len(words) + len(made)
        usage = usage_of(len(words), len(made))
        wants = body.get("tool_choice")
        if isinstance(wants, dict) and not calls:
            message = "Tool choice was required but no tools were called."
            if not body.get("stream"):
                self.reply(500, json.dumps({"message": message, "partial_response": {"usage": usage}}).encode())
                return
            refusal = message
        if not body.get("stream"):
            self.whole(chat, made, calls, finish, usage, body if body.get("logprobs") else None)
            return
        self.open_stream()
        if said[-1] == "slow":
            self.write(b":\n\n")  # axum's keep-alive comment
        if refusal:
            self.error(refusal)
            return
        asked = body if body.get("logprobs") else None
        self.stream(chat, made, calls, finish, usage, asked, said[-1] == "fail midway")

    def head(self, kind: str) -> dict:
        return {
            "id": str(Handler.count),
            "created": int(time.time()),
            "model": self.name,
            "system_fingerprint": "local",
            "object": kind,
        }

    def whole(self, chat: bool, made: list[str], calls: object, finish: str, usage: dict, asked: dict | None) -> None:
        text = "".join(made)
        told = {"content": [self.logprob(word, asked) for word in made]} if asked else None
        choice: dict = {"finish_reason": finish, "index": 0, "logprobs": told}
        if chat:
            choice["message"] = {"content": text or None, "role": "assistant", "tool_calls": calls}
        else:
            choice["text"] = text
        kind = "chat.completion" if chat else "text_completion"
        self.reply(200, json.dumps({**self.head(kind), "choices": [choice], "usage": usage}).encode())

    def open_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True

    def write(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()

    def error(self, message: str) -> None:
        data = {"error": {"message": message, "type": "server_error", "param": None, "code": None}}
        text = json.dumps(data) if self.json_errors else message
        self.write(f"data: {text}\n\n".encode())
        self.write(b"data: [DONE]\n\n")

    def logprob(self, word: str, asked: dict) -> dict:
        """Of base 10 before 0.9.1, and of raw logits at temperature 0; beside what top_k left out nothing."""
        tops = [(WORDS.index(word), word, 0.5), (9, "Hi", 0.1), (10, "Yo", 0.0)]
        log = math.log10 if self.old else math.log
        if self.old and not asked.get("temperature"):
            tops = [(id_, text, 20 - at) for at, (id_, text, _) in enumerate(tops)]
        elif asked.get("top_k") == 1:
            tops = [(id_, text, p if p == 0.5 else 0.0) for id_, text, p in tops]
        told = [{"token": id_, "logprob": log(p) if p else None, "bytes": text} for id_, text, p in tops]
        return {"token": word, "logprob": told[0]["logprob"], "bytes": list(word.encode()), "top_logprobs": told}

    def stream(
        self, chat: bool, made: list[str], calls: object, finish: str, usage: dict, asked: dict | None, fails: bool
    ) -> None:
        for at, word in enumerate(made):
            if fails and at == 2:
                self.error("Model error: shape mismatch in matmul")
                return
            last = at == len(made) - 1
            choice: dict = {"finish_reason": finish if last else None, "index": 0}
            choice["logprobs"] = self.logprob(word, asked) if asked else None
            if chat:
                content = word if calls is None else None
                choice["delta"] = {"content": content, "role": "assistant", "tool_calls": calls}
                body = {**self.head("chat.completion.chunk"), "choices": [choice], "usage": usage if last else None}
            else:
                body = {**self.head("text_completion"), "choices": [{**choice, "text": word}]}
            self.write(b"data: " + json.dumps(body).encode() + b"\n\n")
        self.write(b"data: [DONE]\n\n")


def text_of(message: dict) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)


def call(tool: dict) -> dict:
    function = {"name": tool["function"]["name"], "arguments": '{"city":"Paris"}'}
    return {"index": 0, "id": "call-1", "type": "function", "function": function}


def usage_of(prompt: int, completion: int) -> dict:
    return {
        "completion_tokens": completion,
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "avg_tok_per_sec": 100.0,
        "avg_prompt_tok_per_sec": prompt / 0.05,
        "avg_compl_tok_per_sec": completion / 0.1,
        "total_time_sec": 0.15,
        "total_prompt_time_sec": 0.05,
        "total_completion_time_sec": 0.1,
    }


def load(folder: str, name: str) -> None:
    """Ends as the program does where the file is none that it loads."""
    broken = (
        "Error: Critical failure loading model part 0!\nCheck whether your current quantization format is supported: "
    )
    try:
        start = (Path(folder) / name).read_bytes()[:100_000]
    except FileNotFoundError:
        sys.exit(f"Error: File `{name}` was not found at local model path `{folder}`.")
    if not start.startswith(b"GGUF"):
        sys.exit(f"{broken}unknown magic 0x{start[3::-1].hex()}")
    at = start.find(b"general.architecture")
    if at < 0 or len(start) < 4000:
        sys.exit(f"{broken}failed to fill whole buffer")
    size = int.from_bytes(start[at + 24 : at + 32], "little")
    architecture = start[at + 32 : at + 32 + size].decode()
    if architecture != "llama":
        print(
            f"called `Result::unwrap()` on an `Err` value: Unknown GGUF architecture `{architecture}`", file=sys.stderr
        )
        print("note: run with `RUST_BACKTRACE=1` environment variable to display a backtrace", file=sys.stderr)
        sys.exit(101)


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--stub-version", default="0.9.2")
    options, rest = parser.parse_known_args()
    if "--version" in rest:
        print(f"mistralrs {options.stub_version}")
        return
    if "--help" in rest:
        print(HELP + ("" if options.stub_version.startswith("0.8") else SINCE_09))
        return
    serve = argparse.ArgumentParser()
    serve.add_argument("command", choices=["serve"])
    serve.add_argument("--host", required=True)
    serve.add_argument("-p", "--port", type=int, required=True)
    serve.add_argument("-m", "--model-id", dest="model", required=True)
    serve.add_argument("-f", required=True)
    flags, _ = serve.parse_known_args(rest)
    Handler.name = flags.model
    Handler.old = options.stub_version.startswith("0.8")
    Handler.json_errors = options.stub_version > "0.9.2"
    load(flags.model, flags.f)
    try:
        server = ThreadingHTTPServer((flags.host, flags.port), Handler)
    except OSError as error:
        sys.exit(f"Error: {error.strerror} (os error {error.errno})")
    server.daemon_threads = True
    print(
        f" INFO mistralrs::commands::serve: Server listening on http://{flags.host}:{flags.port}",
        file=sys.stderr,
        flush=True,
    )
    server.serve_forever()


if __name__ == "__main__":
    main()
