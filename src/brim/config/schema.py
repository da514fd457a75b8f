"""The frozen configuration sections. Owns the shape and the meaning of every setting; `resolve` fills them in.

Fields that are None were left to the platform or the model; whoever decides them builds a complete value from it
(`worker.planner`), never writes back here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
DeviceType = str  # auto, or a platform's name; third parties add names (`platforms.detect`)
Quantization = Literal["auto", "none", "gguf"]
KernelChoice = Literal["auto", "torch", "native", "triton"]
ArenaChoice = Literal["auto", "static"]
GraphMode = Literal["NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"]
MemoryKind = Literal["max", "enough", "bytes", "fraction"]
Feature = Literal["graphs", "compile", "virtual_memory", "vendor_kernels"]  # what a start can do without (`config.avoid`)

MAX_LOGPROBS = 20  # alternatives a token may be asked to list, as in OpenAI's API


@dataclass(frozen=True, slots=True)
class MemoryRequest:
    """How much the process may hold. `num_bytes` goes with kind "bytes"; per_million (of the device's total) with "fraction"."""

    kind: MemoryKind
    num_bytes: int = 0
    per_million: int = 0

    def __str__(self) -> str:
        if self.kind == "bytes":
            from_mib, rest = divmod(self.num_bytes, 1 << 20)
            return f"{from_mib}MiB" if not rest else str(self.num_bytes)
        return f"{self.per_million / 10_000:g}%" if self.kind == "fraction" else self.kind


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which model, read how."""

    model: str
    tokenizer: str | None = None
    revision: str | None = None
    load_format: LoadFormat = "auto"
    dtype: Dtype = "auto"
    quantization: Quantization = "auto"  # gguf: the file's blocks as they are; auto: so where kernels can and no dtype was given
    max_model_len: int | Literal["auto"] | None = None  # None: the model's own limit (on a host-memory platform at most 4,096)
    chat_template: str | None = None
    served_model_name: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig:
    """How much memory, and how the KV cache uses it. memory None: the platform's default (max; host memory: enough)."""

    memory: MemoryRequest | None = None
    reserve_bytes: int | None = None
    block_size: int = 16
    enable_prefix_caching: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """The largest step the scheduler may ever form. None: the platform's default."""

    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    enable_chunked_prefill: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConfig:
    """Where and how it computes."""

    device: DeviceType = "auto"
    kernels: KernelChoice = "auto"
    num_threads: int | None = None
    arena: ArenaChoice = "auto"  # static: do without reserve/commit
    graph_mode: GraphMode | None = None
    enforce_eager: bool = False
    compile: bool = False
    strict: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The HTTP side."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 32 << 20
    drain_seconds: int = 30
    step_timeout_seconds: int = (
        60  # no sign of life for that long (and ten times the worst step proven): it hangs; 0: wait for ever
    )
    log_requests: bool = False


@dataclass(frozen=True, slots=True)
class Avoided:
    """A feature that a start does without because it ended an engine process. most: the richest graph mode that may still be
    used, "off" for other features. reason: a clause, `the engine died while capturing graphs (SIGABRT)`."""

    feature: Feature
    most: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BrimConfig:
    """Everything, frozen. `sources` maps a field name to where its value came from: flag, env NAME, file PATH, default; or
    "avoided: REASON" where `avoided` changed it."""

    model: ModelConfig
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    sources: dict[str, str] = field(default_factory=dict)
    avoided: tuple[Avoided, ...] = ()
