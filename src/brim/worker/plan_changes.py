"""Which settings are worth asking about. Owns the changes that `brim plan` prices; what each costs is a plan of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from brim.config.schema import BrimConfig, GraphMode, MemoryRequest
from brim.platforms.base import Capabilities
from brim.worker.phases import StartSettings

_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_LEAST_STEP = 16


@dataclass(frozen=True, slots=True)
class Change:
    """flags: what to give instead; config: with that."""

    setting: str
    flags: str
    config: BrimConfig


def changes_of(config: BrimConfig, settings: StartSettings, capabilities: Capabilities) -> Iterator[Change]:
    """Each setting half and twice as large, every other graph mode and size of element, and more memory where that is not asked
    for already. Only what would be a setting at all: a step holds one token of every sequence."""
    limits = settings.limits
    for count in (limits.max_num_tokens // 2, limits.max_num_tokens * 2):
        if count >= max(limits.max_num_seqs, _LEAST_STEP):
            yield _scheduler(config, "batch tokens", "max_num_batched_tokens", count)
    for count in (limits.max_num_seqs // 2, limits.max_num_seqs * 2):
        if 1 <= count <= limits.max_num_tokens:
            yield _scheduler(config, "sequences", "max_num_seqs", count)
    for length in (limits.max_model_len // 2, limits.max_model_len * 2):
        if 2 <= length <= settings.spec.max_position:
            changed = replace(config.model, max_model_len=length)
            yield Change("longest context", f"--max-model-len {length}", replace(config, model=changed))
    for mode in capabilities.graph_modes:
        if mode != settings.graphs.mode:
            yield _graphs(config, mode)
    element_bytes = settings.dtype.itemsize
    for name in capabilities.dtypes:
        if _DTYPE_BYTES[name] != element_bytes and name != config.model.dtype:
            changed = replace(config.model, dtype=name)  # type: ignore[arg-type]
            yield Change("dtype, KV included", f"--dtype {name}", replace(config, model=changed))
            break
    for size in (settings.layout.block_size // 2, settings.layout.block_size * 2):
        if size >= 1:
            yield Change("KV block", f"--block-size {size}", replace(config, memory=replace(config.memory, block_size=size)))
    if settings.plan.budget.request.kind != "max":
        most = replace(config.memory, memory=MemoryRequest("max"))
        yield Change("memory", "--memory max", replace(config, memory=most))


def _scheduler(config: BrimConfig, setting: str, field: str, value: int) -> Change:
    changed: dict[str, Any] = {field: value}
    return Change(
        setting, f"--{field.replace('_', '-')} {value}", replace(config, scheduler=replace(config.scheduler, **changed))
    )


def _graphs(config: BrimConfig, mode: GraphMode) -> Change:
    changed = replace(config.device, graph_mode=mode, enforce_eager=False)
    return Change("graphs", f"--graph-mode {mode}", replace(config, device=changed))
