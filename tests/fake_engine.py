"""A real engine process with bad habits on request: an OpenAI-like server of known speed that lies, stalls or dies.

python tests/fake_engine.py --port 8099 --load-s 0.3 --ttft-ms 20 --itl-ms 5 --die-after-s 2 --ignore-sigterm --chatty
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

STARTED = time.monotonic()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model-id", default="fake")
    parser.add_argument("--load-s", type=float, default=0.0, help="answers 503 for so long")
    parser.add_argument("--ttft-ms", type=float, default=1.0)
    parser.add_argument("--itl-ms", type=float, default=0.5)
    parser.add_argument("--die-after-s", type=float, default=None)
    parser.add_argument("--exit-code", type=int, default=None, help="say why and leave at once")
    parser.add_argument("--ignore-sigterm", action="store_true")
    parser.add_argument("--needs-two-sigterms", action="store_true")
    parser.add_argument("--chatty", action="store_true", help="writes megabytes to its output")
    parser.add_argument("--health-lies", action="store_true", help="200 on /health, completions never answer")
    parser.add_argument("--never-listens", action="store_true", help="lives, says nothing, opens no port")
    parser.add_argument("--child", action="store_true", help="has a child process of its own")
    parser.add_argument("--silent-empty", action="store_true", help="streams end well, without a token")
    parser.add_argument("--one-write", action="store_true", help="a stream leaves as a whole, at its end")
    parser.add_argument("--gguf", type=Path, help="the file that --checks-gguf looks at")
    parser.add_argument("--checks-gguf", type=int, default=0, help="refuses a file of fewer bytes")
    return parser.parse_args()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    options: argparse.Namespace
    held = b""

    def log_message(self, *_: object) -> None:
        pass

    def loading(self) -> bool:
        return time.monotonic() - STARTED < self.options.load_s

    def reply(self, status: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.loading():
            self.reply(503, {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}})
        elif self.path == "/props":
            self.reply(200, {"default_generation_settings": {"n_ctx": 4096}})
        elif self.path == "/v1/models":
            self.reply(200, {"object": "list", "data": [{"id": self.options.model_id, "object": "model"}]})
        else:
            self.reply(200, {"status": "ok"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        if self.options.health_lies:
            time.sleep(3600)
        if self.loading():
            self.reply(503, {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}})
            return
        n = body.get("max_tokens") or 16
        usage = {"prompt_tokens": 5, "completion_tokens": n, "total_tokens": 5 + n}
        if body.get("stream"):
            self.stream(0 if self.options.silent_empty else n, usage)
        else:
            time.sleep((self.options.ttft_ms + n * self.options.itl_ms) / 1000)
            message = {"role": "assistant", "content": " word" * n}
            self.reply(200, {"choices": [{"index": 0, "message": message, "finish_reason": "length"}], "usage": usage})

    def stream(self, n: int, usage: dict) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": None}, "finish_reason": None}]})
        time.sleep(self.options.ttft_ms / 1000)
        for _ in range(n):
            self.event({"choices": [{"index": 0, "delta": {"content": " word"}, "finish_reason": None}]})
            time.sleep(self.options.itl_ms / 1000)
        self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
        self.event({"choices": [], "usage": usage})
        self.held += b"data: [DONE]\n\n"
        self.release()
        self.close_connection = True

    def event(self, body: dict) -> None:
        self.held += b"data: " + json.dumps(body).encode() + b"\n\n"
        if not self.options.one_write:
            self.release()

    def release(self) -> None:
        held, self.held = self.held, b""
        self.wfile.write(held)
        self.wfile.flush()


def main() -> None:
    options = parse()
    if options.exit_code is not None:
        print("error: invalid argument: --mlock", file=sys.stderr)
        sys.exit(options.exit_code)
    if options.checks_gguf and options.gguf.stat().st_size < options.checks_gguf:
        print("error: tensor 'output' data is not within the file bounds, model is corrupted", file=sys.stderr)
        sys.exit(1)
    signal.signal(signal.SIGTERM, on_sigterm(options))
    if options.child:
        import subprocess

        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(f"child {child.pid}", flush=True)
    if options.chatty:
        for number in range(200_000):
            print(f"line {number} of a server that cannot stop talking", flush=False)
    if options.die_after_s is not None:
        threading.Timer(options.die_after_s, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    if options.never_listens:
        threading.Event().wait()
    Handler.options = options
    server = ThreadingHTTPServer(("127.0.0.1", options.port), Handler)
    server.daemon_threads = True
    print(f"listening on http://127.0.0.1:{options.port}", flush=True)
    server.serve_forever()


def on_sigterm(options: argparse.Namespace):
    seen = []

    def handle(*_: object) -> None:
        seen.append(1)
        if options.ignore_sigterm or (options.needs_two_sigterms and len(seen) < 2):
            return
        os._exit(0)

    return handle


if __name__ == "__main__":
    main()
