"""A store of Ollama's as `ollama pull` and `ollama create` leave one, for tests."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

LAYER = "application/vnd.ollama.image."


class OllamaStore:
    """Manifests and blobs under `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "blobs").mkdir(parents=True)
        (folder / "manifests").mkdir()

    def blob(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        (self.folder / "blobs" / f"sha256-{digest}").write_bytes(data)
        return f"sha256:{digest}"

    def path(self, digest: str) -> Path:
        return self.folder / "blobs" / digest.replace(":", "-")

    def add(self, name: str, gguf: bytes, **texts: Any) -> str:
        """A model NAMESPACE/MODEL/TAG with this file; `texts` are further layers. The digest of its file."""
        digest = self.blob(gguf)
        layers = [{"mediaType": f"{LAYER}model", "digest": digest}]
        for kind, content in texts.items():
            data = content if isinstance(content, str) else json.dumps(content)
            layers.append({"mediaType": f"{LAYER}{kind}", "digest": self.blob(data.encode())})
        self.manifest(name, {"schemaVersion": 2, "layers": layers})
        return digest

    def manifest(self, name: str, content: object) -> Path:
        path = self.folder / "manifests" / "registry.ollama.ai" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path
