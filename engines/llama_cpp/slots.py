"""llama-server's slots and their files (`--slot-save-path`, `POST /slots/N?action=save`), as builds of 2026 have them.

A file holds the tokens and their KV cells. Of the model it holds the architecture's name, the number of layers and the
size and type of their rows (llama.cpp src/llama-context.cpp, src/llama-kv-cache.cpp): a restore into other weights of
the same shape succeeds. It does not hold the checkpoints that recurrent, hybrid and sliding-window models need to go
back a token: there it succeeds, and the next request reads its whole prompt (llama.cpp#25913, #28194).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from engines.llama_cpp.flags import OWN_ARGS
from engines.model.digest import model_digest
from engines.openai.slots import Slot
from engines.settings import Serve

SAVE_PATH = "--slot-save-path"
# adapters that each request can scale, and drafts whose own cache is not in the file
NOT_IN_FILE = ("--lora", "--spec-")
# settings that shape the cache; the length of a sequence chooses the rotary factors of some models (longrope)
SHAPE = {"context_tokens", "parallel", "kv_type", "flash_attention"}


class LlamaSlots:
    path = "/slots"

    def key(self, build: str, serve: Serve) -> str:
        def content(name: str, kind: str) -> str:
            return model_digest(Path(name)) if kind == "file" else name

        own = OWN_ARGS.with_files(serve.own, content).model_dump(mode="json")
        parts = [build, model_digest(serve.gguf), serve.settings.model_dump(mode="json", include=SHAPE), own]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def listed(self, answer: bytes) -> list[Slot]:
        slots = json.loads(answer)
        if not isinstance(slots, list) or not all(isinstance(slot, dict) and "id" in slot for slot in slots):
            raise ValueError("/slots is no list of slots")
        return [
            Slot(int(slot["id"]), int(slot.get("n_prompt_tokens") or 0), bool(slot.get("is_processing")))
            for slot in slots
        ]

    def save(self, slot: int) -> str:
        return f"/slots/{slot}?action=save"

    def restore(self, slot: int) -> str:
        return f"/slots/{slot}?action=restore"

    def body(self, file: str) -> bytes:
        return json.dumps({"filename": file}).encode()

    def tokens(self, status: int, answer: bytes) -> int:
        found = json.loads(answer)
        if status != 200:
            raise ValueError(f"HTTP {status}: {found['error']['message'] if 'error' in found else found}")
        return int(found["n_saved"] if "n_saved" in found else found["n_restored"])
