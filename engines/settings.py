"""Neutral settings: what to serve, in words that belong to no engine. A driver turns them into flags."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, SerializerFunctionWrapHandler, model_serializer

KvType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "f8e4m3"]
NO_FILE = Path()  # of a model whose file is not known: an attached engine has it
AUTO_PARALLEL = 4  # llama-server's choice in builds of 2026 (tools/server/server.cpp)


def safe_id(name: str) -> str:
    """A model's name as an id that a plan accepts, with `-` for other characters."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "model"


class Settings(BaseModel):
    """How a model is served. `None` means: the engine's own default; nothing is passed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    context_tokens: int | None = Field(None, ge=1, description="context for all sequences together, in tokens")
    parallel: int = Field(1, ge=0, description="sequences served at the same time; 0: what the engine chooses")
    gpu_layers: int | None = Field(None, ge=0, description="layers on the GPU; 0 keeps all on the CPU")
    threads: int | None = Field(None, ge=1, description="CPU threads that generate")
    batch_tokens: int | None = Field(None, ge=1, description="logical prefill batch")
    ubatch_tokens: int | None = Field(None, ge=1, description="physical prefill batch")
    flash_attention: bool | None = Field(None, description="fused attention kernels on or off")
    kv_type: KvType | None = Field(None, description="element type of the KV cache")
    mlock: bool = Field(False, description="keep the weights in RAM")
    cache_reuse_tokens: int | None = Field(None, ge=0, description="smallest chunk of cache to reuse by shifting")
    host_cache_mib: int | None = Field(None, ge=-1, description="budget of the prompt cache in host RAM; -1: no bound")
    jinja: bool = Field(True, description="render the model's own chat template")
    prefill_assistant: bool = Field(True, description="a trailing assistant message is continued, not closed")
    seed: int | None = Field(None, ge=0, description="seed of the engine's sampler")
    api_key: SecretStr | None = Field(None, description="key that clients must send")
    chat_template: Path | None = Field(None, description="a template file instead of the model's own")
    tokenizer_json: Path | None = Field(None, description="a tokenizer.json instead of the GGUF's own")

    @property
    def sequences(self) -> int:
        """How many sequences are served at the same time, as far as it is known before the engine runs."""
        return self.parallel or AUTO_PARALLEL


class EngineArgs(BaseModel):
    """Flags and variables that no neutral setting has a word for: passed on as they stand."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    args: tuple[str, ...] = Field((), description="flags of the engine's own, passed on as they stand")
    env: dict[str, str] = Field({}, description="variables of the engine's own, passed on as they stand")

    @model_serializer(mode="wrap")
    def _without_unused(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # what is stored and hashed stays as it was before these keys
        return {key: value for key, value in dump(self).items() if value or key not in EngineArgs.model_fields}


class Serve(BaseModel):
    """One model on one loopback port with its settings: all that a driver needs to know to build an argv."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_id: str = Field(min_length=1, description="the name by which clients ask for the model")
    gguf: Path
    port: int = Field(ge=1, le=65535)
    host: str = "127.0.0.1"
    settings: Settings = Settings()
    own: EngineArgs = EngineArgs()
    request_defaults: dict[str, Any] = Field({}, description="fields of a request that does not set them itself")
    url: str = Field("", description="where an attached engine answers, without /v1")
    name_there: str = Field("", description="the model's name at that engine, where it is another")
    slots: Path | None = Field(None, exclude=True, description="folder in which the engine saves its slots")

    @property
    def base_url(self) -> str:
        return self.url or f"http://{self.host}:{self.port}"


class Endpoint(BaseModel):
    """Where a served model answers, and who answers there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_url: str = Field(description="http://host:port, without /v1")
    model_id: str
    engine: str = Field(description="driver name: llama.cpp, mistral.rs")
    version: str = ""
    context_tokens: int | None = Field(None, description="usable context of one sequence, where known")
    api_key: SecretStr | None = None
    request_defaults: dict[str, Any] = Field({}, description="fields of a request that does not set them itself")
    speaks: Callable[..., Any] | None = Field(
        None,
        exclude=True,
        repr=False,
        description="the engine's dialect of a call and a model's name, where it has one",
    )

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key.get_secret_value()}"} if self.api_key else {}
