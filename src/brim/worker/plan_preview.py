"""What starts would come to, for people who choose a device or settings. Owns the document of `brim plan`.

Every figure is a plan of `startup.plan_start`, made again with something changed; nothing is computed beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from brim.config.model_source import ModelSource, open_model
from brim.config.schema import BrimConfig, MemoryRequest
from brim.errors import BrimError, ConfigError, MemoryBudgetError
from brim.formats.model_files import resolve_model
from brim.memory.ledger import OURS
from brim.memory.report import report_json
from brim.units import MIB, format_bytes
from brim.worker.phases import StartSettings
from brim.worker.plan_changes import changes_of
from brim.worker.plan_device import PlanDevice
from brim.worker.plan_ranks import RANK_COUNTS, rank_source
from brim.worker.start_preview import refusal_json


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """One model with its settings, opened as far as its shapes."""

    config: BrimConfig
    source: ModelSource

    @property
    def name(self) -> str:
        """As the user wrote it."""
        return self.config.model.model

    def close(self) -> None:
        """Unmap its files."""
        self.source.close()


def open_planned(config: BrimConfig) -> PlannedModel:
    """Shapes only: weights may be missing. Raises ModelNotFound, BrokenModel, UnsupportedModel."""
    files = resolve_model(config.model.model, config.model.revision, with_weights=False)
    if files.kind != "gguf":
        config = replace(config, model=replace(config.model, load_format="dummy"))
    return PlannedModel(config, open_model(config.model, files))


def plan_model(model: PlannedModel, device: PlanDevice, neighbour_bytes: int = 0) -> dict[str, Any]:
    """One model on one device, alone or beside others: the plan or why there is none, and what changes would change."""
    found: dict[str, Any] = {
        "model": model.name,
        "device": device.name,
        "device_description": device.description,
        "device_known": device.known,
        "fits": False,
        "refused": None,
        "notes": list(_notes(model.config)),
    }
    config, source = model.config, model.source
    try:
        settings = device.plan(config, source, neighbour_bytes)
    except ConfigError:
        raise
    except BrimError as error:
        found["refused"] = refusal_json(error)
        found["tensor_parallel"] = _ranks(model, device)
        return found
    base = summary(settings)
    found |= {"fits": True, **base, "plan": report_json(settings.plan, settings.plan.ledger)}
    found["longest_context"] = _longest(model, device, neighbour_bytes)
    found["tensor_parallel"] = _ranks(model, device)
    changes = []
    for change in changes_of(config, settings, device.opened(config, source)[0].capabilities):
        if neighbour_bytes and change.setting == "memory":
            continue  # its share was divided with the other models
        differences = _changed(device, change.config, source, base, neighbour_bytes)
        changes.append({"setting": change.setting, "flags": change.flags, **differences})
    found["changes"] = changes
    gaining = [one for one in changes if (one["delta_kv_tokens"] or 0) > 0]
    found["best_change"] = max(gaining, key=lambda one: int(one["delta_kv_tokens"]), default=None)
    return found


def plan_together(models: Sequence[PlannedModel], device: PlanDevice) -> list[dict[str, Any]]:
    """Several models on one device: what each needs beside KV, and an equal part of the rest for KV, as `--memory` for each.

    Raises ConfigError where --memory is given too, MemoryBudgetError where they do not fit together.
    """
    asked = next((m for m in models if m.config.memory.memory is not None), None)
    if asked is not None:
        raise ConfigError(
            f"--memory {asked.config.memory.memory} cannot be each of {len(models)} models' share; leave it out, the plan says "
            "which --memory to give to each."
        )
    shares = _shares(models, device)
    found = []
    for index, (model, share_bytes) in enumerate(zip(models, shares, strict=True)):
        memory = MemoryRequest("bytes", num_bytes=share_bytes)
        config = replace(model.config, memory=replace(model.config.memory, memory=memory))
        others_bytes = sum(shares) - share_bytes
        one = plan_model(PlannedModel(config, model.source), device, others_bytes)
        found.append({**one, "share_bytes": share_bytes, "order": index + 1})
    return found


def _shares(models: Sequence[PlannedModel], device: PlanDevice) -> list[int]:
    """Whole MiB for each model; under "enough" what it needs, else everything beside KV and an equal part for KV."""
    plans = [_alone(model, device) for model in models]
    held = [plan.cap_bytes - plan.kv_bytes for plan in plans]
    platform, _ = device.opened(models[0].config, models[0].source)
    reading = platform.reading()
    room_bytes = reading.reachable_bytes - plans[0].budget.reserve_bytes
    if plans[0].budget.decided_by_plan:
        shares = [plan.cap_bytes // MIB * MIB + MIB for plan in plans]
        if sum(shares) <= room_bytes:
            return shares
    rest_bytes = room_bytes - sum(held)
    least = [plan.split.bytes_for(plan.min_blocks) for plan in plans]
    if rest_bytes < sum(least):
        need = sum(held) + sum(least)
        raise MemoryBudgetError(
            f"The models do not fit together on {device.name}: one full-length request each takes {format_bytes(need)} and there "
            f"are {format_bytes(room_bytes)}; lower --max-model-len, or plan for fewer models."
        )
    spare_bytes = rest_bytes - sum(least)
    return [
        (one_held + one_least + spare_bytes // len(models)) // MIB * MIB for one_held, one_least in zip(held, least, strict=True)
    ]


def _alone(model: PlannedModel, device: PlanDevice) -> Any:
    return device.plan(model.config, model.source).plan


def summary(settings: StartSettings) -> dict[str, Any]:
    """A plan in a few numbers: bytes by category, KV tokens, requests, limits and modes."""
    plan = settings.plan
    by_category = {line.category: plan.ledger.bytes_of(line.category) for line in plan.ledger.lines}
    return {
        "dtype": str(settings.dtype).removeprefix("torch."),
        "graph_mode": settings.graphs.mode,
        "graph_mode_reason": settings.graphs.reason,
        "max_model_len": plan.limits.max_model_len,
        "max_num_seqs": plan.limits.max_num_seqs,
        "max_num_batched_tokens": plan.limits.max_num_tokens,
        "block_size": settings.layout.block_size,
        "memory": str(plan.budget.request),
        "cap_bytes": plan.cap_bytes,
        "held_bytes": plan.ledger.held_bytes,
        "bytes": {name: size for name, size in by_category.items() if name in OURS},
        "kv_bytes": plan.kv_bytes,
        "kv_tokens": plan.kv_tokens,
        "full_length_requests": plan.full_length_requests,
    }


def _changed(
    device: PlanDevice, config: BrimConfig, source: ModelSource, base: dict[str, Any], neighbour_bytes: int
) -> dict[str, Any]:
    """The plan with a change, as differences; `refused` where there is none."""
    keys = ("kv_tokens", "cap_bytes", "full_length_requests", "bytes")
    try:
        found = summary(device.plan(config, source, neighbour_bytes))
    except BrimError as error:
        return {**dict.fromkeys(keys), "delta_kv_tokens": None, "delta_cap_bytes": None, "refused": str(error)}
    return {
        **{key: found[key] for key in keys},
        "delta_kv_tokens": found["kv_tokens"] - base["kv_tokens"],
        "delta_cap_bytes": found["cap_bytes"] - base["cap_bytes"],
        "refused": None,
    }


def _longest(model: PlannedModel, device: PlanDevice, neighbour_bytes: int) -> dict[str, Any]:
    """The longest context of which one request fits, everything else as it is."""
    config = replace(model.config, model=replace(model.config.model, max_model_len="auto"))
    try:
        longest = device.plan(config, model.source, neighbour_bytes).plan.limits.max_model_len
    except BrimError as error:
        return {"tokens": None, "is_the_models_limit": False, "why": str(error)}
    return {"tokens": longest, "is_the_models_limit": longest == model.source.spec.max_position, "why": ""}


def _notes(config: BrimConfig) -> Iterator[str]:
    """What is asked for and not in the plan."""
    if config.device.compile:
        yield "--compile: what compiled functions take was not measured and is not in this plan; the start measures it."


def _ranks(model: PlannedModel, device: PlanDevice) -> list[dict[str, Any]]:
    """The model split over 1, 2, 4 and 8 such devices; what cannot be split says why. One runs today."""
    found = []
    for count in RANK_COUNTS:
        one: dict[str, Any] = {"size": count, "runs_today": count == 1, "refused": None, "kv_tokens": None, "weight_bytes": None}
        try:
            plan = device.plan(model.config, rank_source(model.source, count)).plan
            one |= {
                "kv_tokens": plan.kv_tokens,
                "weight_bytes": plan.ledger.bytes_of("weights"),
                "full_length_requests": plan.full_length_requests,
            }
        except BrimError as error:
            one["refused"] = str(error)
        found.append(one)
    return found
