"""Both engines, played: a `binary` for llama.cpp (llama-server's flags) and for mistral.rs (`mistralrs serve`).

The answers are tests/rig/openai_stub.py's. What goes wrong is written in the model file's name, engine first:
`candidate-refuses.gguf`, `both-refuse.gguf`, `incumbent-dies.gguf` (in its second chat), `candidate-odd-logprobs.gguf`.
A file `NAME.gguf.fixed` beside it ends that.
"""

import os
import sys
import threading
from pathlib import Path

from openai_stub import Handler, Stub

from engines.errors import BadInput
from engines.model.header import read_header

LIVES_FOR = 1  # the readiness token


class Answers(Handler):
    """The stub's answers until it is time to go wrong."""

    goes_wrong = ""
    chats = 0

    def do_POST(self) -> None:
        if self.path == "/v1/chat/completions":
            Answers.chats += 1
        if self.goes_wrong == "dies" and Answers.chats > LIVES_FOR:
            print("error: assertion failed in the played attention kernel", file=sys.stderr, flush=True)
            os._exit(3)
        super().do_POST()

    def logprobs(self, tokens, body):
        found = super().logprobs(tokens, body)
        return [{**one, "top_logprobs": 7} for one in found] if self.goes_wrong == "odd-logprobs" else found


def value_of(*flags: str) -> str:
    at = next(index for index, word in enumerate(sys.argv) if word in flags)
    return sys.argv[at + 1]


def main() -> None:
    is_candidate = "serve" in sys.argv
    if "--version" in sys.argv:
        build = Path(sys.argv[0]).with_name("build")
        llama = f"version: {build.read_text() if build.exists() else '1 (played)'}"
        print("mistralrs 0.9.5" if not Path(sys.argv[0]).name.startswith("llama") else llama)
        return
    if "--help" in sys.argv:
        print("--host --port --model --format --quantized-file --max-seqs --no-ui --ctx-size")
        more = Path(sys.argv[0]).with_name("help")  # options of this build
        print(more.read_text() if more.exists() else "")
        return
    arm = "candidate" if is_candidate else "incumbent"
    model = Path(value_of("-m"), value_of("-f")) if is_candidate else Path(value_of("-m"))
    who, _, wrong = model.stem.partition("-")
    if who not in (arm, "both") or model.with_name(f"{model.name}.fixed").exists():
        wrong = ""
    if wrong.startswith("refuse"):
        print("loading the model", file=sys.stderr)
        print(
            f"error: the played engine does not know this model; the key is {os.environ.get('LLAMA_API_KEY')}",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(1)
    try:
        read_header(model)
    except BadInput as error:  # cut short
        sys.exit(f"error: {error}")
    Answers.goes_wrong = wrong
    server = Stub(frozenset({"needs no key", "serves any model"}), port=int(value_of("-p", "--port")), handler=Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print("listening", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
