"""A device's profile, measured: small real models are started, and what their starts took becomes the figures that plans predict
with. Owns which starts, and how figures follow from them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from brim.config.schema import GraphMode
from brim.errors import DeviceError
from brim.kernels.planned import planned_kernels
from brim.kernels.triton.scratch import KernelLimits
from brim.platforms.profile import DeviceProfile, Figure, profile_of
from brim.platforms.profile_platform import allocator_bytes
from brim.units import GIB, MIB, ceil_div, round_up
from brim.worker.device_worker import DeviceWorker

_BACKENDS = {"cpu": "native"}  # name of kernels -> the profile's word, where they differ
_SHAPE = {"model_type": "llama", "head_dim": 128, "max_position_embeddings": 4096, "torch_dtype": "bfloat16"}
_SMALL = {
    "vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
_WIDE = {
    "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 4,
}  # fmt: skip
_ROUNDING_MARGIN_BYTES = 12 * MIB  # larger models round more often: 20 MiB more was seen on an H100
_STARTING_MARGIN_BYTES = MIB


@dataclass(frozen=True, slots=True)
class CalibrationStart:
    """One start: so many layers, sequences at most, in that graph mode. is_wide: as wide as models that people serve."""

    num_layers: int
    max_num_seqs: int
    graph_mode: GraphMode
    is_wide: bool = False

    @property
    def model(self) -> dict[str, Any]:
        """Its config.json."""
        return {**_SHAPE, **(_WIDE if self.is_wide else _SMALL), "num_hidden_layers": self.num_layers}

    @property
    def settings(self) -> dict[str, Any]:
        """Its settings."""
        return {
            "load_format": "dummy",
            "max_model_len": 1024,
            "max_num_seqs": self.max_num_seqs,
            "graph_mode": self.graph_mode,
            "memory": "6GiB" if self.is_wide else "2GiB",
        }


# The first tells what kind of device it is. Two depths and two numbers of graphs then tell what a layer, a graph and the first of
# them cost; on an accelerator readings move by 2 MiB, so that there are more of both, and libraries choose kernels by width.
FIRST_START = CalibrationStart(4, 16, "NONE")
HOST_STARTS = (
    CalibrationStart(24, 16, "NONE"),
    CalibrationStart(4, 64, "FULL_DECODE_ONLY"),
    CalibrationStart(24, 64, "FULL_DECODE_ONLY"),
    CalibrationStart(24, 8, "FULL_DECODE_ONLY"),
)
DEVICE_STARTS = (
    CalibrationStart(24, 256, "NONE", is_wide=True),
    CalibrationStart(4, 256, "FULL_DECODE_ONLY", is_wide=True),
    CalibrationStart(24, 256, "FULL_DECODE_ONLY", is_wide=True),
    CalibrationStart(24, 8, "FULL_DECODE_ONLY", is_wide=True),
    CalibrationStart(24, 256, "PIECEWISE", is_wide=True),
)


def later_starts(first: MeasuredStart) -> tuple[CalibrationStart, ...]:
    """What else to start on the device of the first."""
    return HOST_STARTS if first.host_memory else DEVICE_STARTS


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredStart:
    """What one start took, in bytes. opening: of libraries and kernels; left: beyond all that is computed, graphs apart.

    num_whole, num_pieces: graphs of each kind. kernel_bytes: of the kernels' own buffers, by the allocator's segments.
    """

    device: str
    description: str
    kernels: str
    host_memory: bool
    virtual_memory: bool
    graphs: bool
    dtypes: tuple[str, ...]
    total_bytes: int
    outside_bytes: int
    granularity_bytes: int
    num_cores: int
    context_bytes: int
    opening_bytes: int
    kernel_bytes: int
    left_bytes: int
    graph_bytes: int
    num_layers: int
    num_whole: int
    num_pieces: int


def measured_start(worker: DeviceWorker) -> MeasuredStart:
    """The figures of a start that is ready."""
    opened = worker.ready.warm.reserved.loaded.opened
    settings, platform, kernels, records = opened.settings, opened.platform, opened.kernels, worker.phase_records
    choice, sizes, capabilities = settings.graphs, settings.sizes, platform.capabilities
    captured = bool(worker.num_programs)
    spec = settings.spec
    limits = KernelLimits.of(spec, settings.limits.max_num_seqs)
    backend, num_cores = _BACKENDS.get(kernels.name, kernels.name), int(getattr(kernels, "num_cores", 1))
    now = platform.reading()
    later = [record for record in records if record.name not in ("open", "capture")]
    computed_bytes = sum(line.num_bytes for record in later for line in record.lines if line.known_by == "computed")
    taken_bytes = sum(record.change.ours_bytes for record in later)
    described = platform.describe()
    return MeasuredStart(
        device=str(described.get("device", platform.name)),
        description=", ".join(f"{key} {described[key]}" for key in ("driver", "torch") if key in described),
        kernels=backend,
        host_memory=capabilities.host_memory,
        virtual_memory=capabilities.reserve_commit,
        graphs=capabilities.graphs,
        dtypes=capabilities.dtypes,
        total_bytes=now.total_bytes,
        outside_bytes=0 if capabilities.host_memory else records[0].before.reading.others_bytes,
        granularity_bytes=capabilities.granularity_bytes,
        num_cores=num_cores,
        context_bytes=worker.ledger.lines[0].num_bytes,
        opening_bytes=sum(record.change.ours_bytes for record in records if record.name == "open"),
        kernel_bytes=allocator_bytes(planned_kernels(backend, limits, num_cores).buffers),
        left_bytes=max(0, taken_bytes - computed_bytes),
        graph_bytes=sum(record.change.ours_bytes for record in records if record.name == "capture") if captured else 0,
        num_layers=spec.num_layers,
        num_whole=(len(sizes.decode) * choice.decode_whole + len(sizes.mixed) * choice.mixed_whole) * captured,
        num_pieces=len(sizes.mixed) * choice.pieces * (spec.num_layers + 1) * captured,
    )


def profile_from(starts: Sequence[MeasuredStart], date: str) -> DeviceProfile:
    """The profile that these starts give. Each figure is at least what any of them took.

    Raises DeviceError where there is none to go by.
    """
    if not starts:
        raise DeviceError("No start came to be on this device, so nothing was measured; brim doctor says what does not work.")
    first, source = starts[0], f"brim doctor --calibrate, {date}"
    known = profile_of(first.device)

    def figure(value: int, how: str) -> Figure:
        return Figure(value, "measured", f"{how}; {source}")

    figures = {
        "total_bytes": figure(first.total_bytes, "what the device reports"),
        "outside_bytes": figure(min(one.outside_bytes for one in starts), "held by nobody or by other processes at the start"),
        "num_cores": figure(first.num_cores, "what the device reports"),
        "granularity_bytes": figure(first.granularity_bytes, "what the platform commits by"),
    }
    if first.host_memory:
        opened_bytes = max(one.context_bytes + one.opening_bytes for one in starts)
        figures["context_bytes"] = figure(opened_bytes, f"the most of {len(starts)} starts, kernels included")
        left_bytes = round_up(max(one.left_bytes for one in starts) + _STARTING_MARGIN_BYTES, MIB)
        figures["starting_bytes"] = figure(left_bytes, "the most that was left beyond what is computed, and 1 MiB")
    else:
        figures["context_bytes"] = figure(max(one.context_bytes for one in starts), f"the most of {len(starts)} starts")
        library_bytes = max(one.opening_bytes - one.kernel_bytes for one in starts)
        figures["library_bytes"] = figure(max(0, library_bytes), "phase open less the kernels' own buffers")
        left_bytes = round_up(max(one.left_bytes for one in starts) + _ROUNDING_MARGIN_BYTES, 2 * MIB)
        figures["rounding_bytes"] = figure(left_bytes, "the most that was left beyond what is computed, and 12 MiB")
    fitted = fit_graphs(starts)
    figures |= {name: figure(value, "fitted to what captures took, never below it") for name, value in fitted.items()}
    return DeviceProfile(
        name=known.name if known else _slug(first),
        description=f"{first.device}, {first.description}".rstrip(", "),
        host_memory=first.host_memory,
        kernels=first.kernels,
        dtypes=first.dtypes,
        figures=figures,
        devices=(first.device,),
        virtual_memory=first.virtual_memory,
        graphs=first.graphs,
    )


def fit_graphs(starts: Sequence[MeasuredStart]) -> dict[str, int]:
    """Figures of graphs: a layer of a whole step from two depths, a step from two counts, a piece from a start with pieces.

    What the captures took beyond these is the fixed part. Example: 64 and 192 MiB for 32 graphs of 4 and 12 layers are 512 KiB
    a layer. No graphs: nothing is fitted.
    """
    whole = [one for one in starts if one.num_whole and not one.num_pieces]
    pieces = [one for one in starts if one.num_pieces]
    if not whole:
        return {}
    most = max(one.num_whole for one in whole)
    deep = sorted((one for one in whole if one.num_whole == most), key=lambda one: one.num_layers)
    layers = deep[-1].num_layers - deep[0].num_layers
    a_layer = max(0, ceil_div(deep[-1].graph_bytes - deep[0].graph_bytes, most * layers)) if layers else 0
    few = min((one for one in whole if one.num_layers == deep[-1].num_layers), key=lambda one: one.num_whole)
    more = most - few.num_whole
    a_step = ceil_div(deep[-1].graph_bytes - few.graph_bytes, more) - a_layer * deep[-1].num_layers if more else 0
    found = {"graph_whole_layer_bytes": a_layer, "graph_whole_bytes": max(0, a_step)}
    piece = max((ceil_div(one.graph_bytes, one.num_pieces) for one in pieces if not one.num_whole), default=0)
    if pieces:
        found["graph_piece_bytes"] = piece

    def beyond(one: MeasuredStart) -> int:
        said = one.num_whole * (found["graph_whole_bytes"] + one.num_layers * a_layer) + one.num_pieces * piece
        return one.graph_bytes - said

    return {**found, "graph_fixed_bytes": max(0, *(beyond(one) for one in (*whole, *pieces)))}


def start_json(start: MeasuredStart) -> dict[str, Any]:
    """Plain values."""
    return asdict(start)


def start_of_json(found: dict[str, Any]) -> MeasuredStart:
    """The reverse."""
    return MeasuredStart(**{**found, "dtypes": tuple(found["dtypes"])})


def _slug(start: MeasuredStart) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", start.device.lower()).strip("-")
    return f"{words[:40].strip('-')}-{round(start.total_bytes / GIB)}g"
