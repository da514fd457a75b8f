"""What a start would do with these settings on this device, and why, without reading a weight. Owns the description; the
decisions are `startup.plan_start`'s and `memory.budget`'s."""

from __future__ import annotations

from typing import Any

from brim.config.model_source import ModelSource, open_model
from brim.config.model_spec import ModelSpec, spec_from_hf_config
from brim.config.schema import BrimConfig, MemoryRequest
from brim.errors import BrimError, MemoryBudgetError, OutOfDeviceMemory
from brim.formats.model_files import ModelFiles
from brim.kernels.select import KernelSelection, select_kernels
from brim.kernels.triton.scratch import KernelLimits
from brim.memory.budget import decide_budget
from brim.memory.ledger import Ledger
from brim.memory.report import ledger_json, report_json
from brim.platforms.base import Platform
from brim.worker.phases import StartSettings
from brim.worker.startup import plan_start

# Decides what does not depend on a model where none was named.
_ANY_MODEL = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512,
}  # fmt: skip


def preview_caps(config: BrimConfig, platform: Platform) -> list[dict[str, Any]]:
    """The cap that `--memory max`, `enough` and the one given lead to now, each with its arithmetic or its refusal."""
    defaults = platform.default_limits()
    given_reserve = config.memory.reserve_bytes
    reserve_bytes = defaults.reserve_bytes if given_reserve is None else given_reserve
    chosen = config.memory.memory or MemoryRequest(defaults.memory)
    found: list[dict[str, Any]] = []
    for request in dict.fromkeys((MemoryRequest("max"), MemoryRequest("enough"), chosen)):
        named = {"memory": str(request), "chosen": request == chosen}
        try:
            budget = decide_budget(request, platform.reading(), reserve_bytes, reserve_given=given_reserve is not None)
            found.append({**named, "cap_bytes": budget.cap_bytes, "reasons": list(budget.reasons), "refused": None})
        except MemoryBudgetError as error:
            found.append({**named, "cap_bytes": None, "reasons": [], "refused": str(error)})
    return found


def preview_start(config: BrimConfig, platform: Platform, *, has_model: bool) -> dict[str, Any]:
    """Arena, kernels, graph mode, dtype and limits with their reasons; with a model its plan too. `refused`: what start-up would
    say instead of starting."""
    name = config.model.model if has_model else None
    found: dict[str, Any] = {"model": name, "arena": _arena(config, platform), "refused": None}
    try:
        source = open_model(config.model) if has_model else _any_model()
        try:
            found |= _decide(config, platform, source, has_model)
        finally:
            source.close()
    except BrimError as error:
        found["refused"] = refusal_json(error)
    return found


def _decide(config: BrimConfig, platform: Platform, source: ModelSource, has_model: bool) -> dict[str, Any]:
    selection = open_kernels(config, platform, source.spec)
    try:
        with platform.stream():  # as a start does: what libraries keep is held when the plan is made
            selection.kernels.start_libraries()
        settings = plan_start(config, platform, selection.kernels, source)
    finally:
        selection.kernels.close()
    why = selection.fallback_reason or "The fastest there is for this device."
    found: dict[str, Any] = {
        "kernels": {"name": selection.kernels.name, "reason": why},
        "graph_mode": {"mode": settings.graphs.mode, "reason": settings.graphs.reason},
        "limits": _limits(config, settings, has_model),
    }
    if has_model:
        plan = settings.plan
        found["dtype"] = str(settings.dtype).removeprefix("torch.")
        found["weights"] = settings.weights.text
        found["plan"] = report_json(plan, plan.ledger)
    return found


def open_kernels(config: BrimConfig, platform: Platform, spec: ModelSpec) -> KernelSelection:
    """The kernels that a start would take."""
    native = config.device.kernels != "torch"
    limits = kernel_limits(config, platform, spec)
    return select_kernels(platform.torch_device(), config.device.num_threads, spec.head_dim, native, limits)


def kernel_limits(config: BrimConfig, platform: Platform, spec: ModelSpec) -> KernelLimits:
    """What decides how large the kernels' own buffers are."""
    return KernelLimits.of(spec, config.scheduler.max_num_seqs or platform.default_limits().max_num_seqs)


def _limits(config: BrimConfig, settings: StartSettings, has_model: bool) -> dict[str, Any]:
    """Each limit with where it comes from: a flag, a variable, a file, or the platform's default."""
    limits = settings.limits
    values = {"max_num_seqs": limits.max_num_seqs, "max_num_batched_tokens": limits.max_num_tokens}
    if has_model:
        values["max_model_len"] = limits.max_model_len
    return {name: {"value": value, "source": config.sources.get(name, "default")} for name, value in values.items()}


def _arena(config: BrimConfig, platform: Platform) -> dict[str, Any]:
    capabilities = platform.capabilities
    if capabilities.reserve_commit:
        reason = "Addresses are reserved once and memory is committed and uncommitted behind them."
    elif config.device.arena == "static":
        reason = "--arena static asks for it: the cache is taken whole, and built again when its size is known."
    else:
        why_not = platform.reasons.get("reserve_commit") or "The platform cannot commit memory later."
        reason = f"{why_not} The cache is taken whole, and built again when its size is known."
    return {"backend": capabilities.arena_backend, "reserve_commit": capabilities.reserve_commit, "reason": reason}


def refusal_json(error: BrimError) -> dict[str, Any]:
    """The error as `cli.errors` prints it: its sentence and its ledger."""
    known = isinstance(error, (MemoryBudgetError, OutOfDeviceMemory))
    ledger: Ledger | None = error.ledger if known else None  # type: ignore[attr-defined]
    nearest = list(error.nearest) if known else []  # type: ignore[attr-defined]
    table = None
    if ledger is not None:
        table = {"cap_bytes": ledger.cap_bytes, "total_bytes": ledger.total_bytes, "ledger": ledger_json(ledger.lines)}
    return {"error": type(error).__name__, "message": str(error), "nearest": nearest, "ledger": table}


def _any_model() -> ModelSource:
    return ModelSource(ModelFiles(name="-", kind="config_only", weight_paths=()), spec_from_hf_config(_ANY_MODEL), None, ())
