"""Settings of the yard: where it listens, how much it takes, when it gives up. The `[yard]` table of a plan."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from engines.environment import is_loopback, plain_host

Load = Literal["start", "demand"]  # when a model comes into memory: with the yard, or with its first request
# left out where unused: older plans keep their hashes
LATER = ("client_stall_s", "failed_requests", "allowed_hosts", "prompt_cache_mib")


class YardSettings(BaseModel):
    """The public port and its limits. Times are seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    host: str = Field("127.0.0.1", description="address that clients use; anything but loopback needs api_key_env")
    port: int = Field(8080, ge=1, le=65535, description="port that clients use; the incumbent's own port before")
    allowed_hosts: tuple[str, ...] = Field(
        (), description="names by which clients reach it, beside localhost; * is any"
    )
    default_model: str | None = Field(None, description="model for requests that name none; the plan's first otherwise")
    unknown_model: Literal["default", "refuse"] = Field("default", description="an unknown name: default model, or 404")
    max_body_mib: int = Field(32, ge=1, le=1024, description="largest request body; beyond it 413")
    max_header_kib: int = Field(16, ge=1, le=1024, description="longest request line or header field; beyond it 400")
    max_waiting: int = Field(128, ge=0, description="requests that may wait for a model; beyond it 429")
    wait_s: float = Field(600, gt=0, description="how long a request waits for its turn; beyond it 503")
    keepalive_s: float = Field(10, gt=0, description="seconds between SSE comments to a stream that waits")
    client_stall_s: float = Field(120, gt=0, description="a client that takes nothing of its answer for so long is cut")
    stop_s: float = Field(30, gt=0, description="on SIGTERM, how long requests in flight may still take")
    load_stall_s: float = Field(120, gt=0, description="loading without any progress for so long has failed")
    wedged_after_s: float = Field(20, gt=0, description="a working engine is wedged after so long without progress")
    probe_every_s: float = Field(60, gt=0, description="seconds between liveness probes of an idle engine")
    failed_probes: int = Field(3, ge=1, description="failed liveness probes in a row that restart an idle engine")
    failed_requests: int = Field(3, ge=1, description="failed requests in a row, no client faults, that cause a probe")
    restarts: int = Field(3, ge=0, description="restarts within restart_window_s before the fallback takes over")
    restart_window_s: float = Field(1800, gt=0, description="window of the restart budget")
    try_again_s: float = Field(60, gt=0, description="none could be kept up: seconds until all engines are tried again")
    memory_budget_mib: int | None = Field(
        None, ge=1, description="memory of all engines, VRAM included; past it the model used longest ago is unloaded"
    )
    unload_after_s: float | None = Field(None, gt=0, description="an unpinned model unused for so long is unloaded")
    memory_back_s: float = Field(30, gt=0, description="how long a stopped engine's memory may take to come back")
    prompt_cache_mib: int = Field(
        4096, ge=0, description="disk for the prompts that an engine had cached when it was stopped; 0 saves none"
    )
    move_s: float = Field(600, gt=0, description="how long a candidate may take to come up before the move is undone")
    canary_judge_s: float = Field(5, gt=0, description="seconds between judgements of a canary; FAIL rolls it back")
    shadow_share: float = Field(0, ge=0, le=1, description="share of chat requests copied to a candidate that is up")
    shadow_when: Literal["idle", "slot"] = Field(
        "idle", description="copies are sent while the yard has no user's request, or (slot) the candidate has none"
    )
    shadow_waiting: int = Field(8, ge=1, le=1000, description="copies that may wait; beyond it they are dropped")
    shadow_pairs: Path | None = Field(None, description="JSONL of answers, redacted; relative to the yard's folder")
    capture: Path | None = Field(None, description="JSONL of chat requests, redacted; relative to the yard's folder")
    capture_mib: int = Field(64, ge=1, le=65536, description="most that each of these files may hold; the oldest go")

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        return {
            key: value
            for key, value in dump(self).items()
            if key not in LATER or getattr(self, key) != fields[key].get_default()
        }

    @model_validator(mode="after")
    def _an_address(self) -> YardSettings:
        if self.host != "localhost":
            try:
                ipaddress.ip_address(self.host)
            except ValueError:
                raise ValueError(f"host '{self.host}' is no address; write 127.0.0.1, or 0.0.0.0 for all") from None
        return self

    @field_validator("allowed_hosts")
    @classmethod
    def _names(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        hosts = tuple(map(plain_host, hosts))
        for host in hosts:
            if re.fullmatch(r"\*|[a-z0-9._-]+|[0-9a-f:.]*:[0-9a-f:.]*:[0-9a-f:.]*", host) is None:
                raise ValueError(f"'{host}' is no host name; write it without http:// and without a port")
        return hosts

    @property
    def on_loopback(self) -> bool:
        return is_loopback(self.host)
