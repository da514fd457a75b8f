"""Plans as stacked bars. Owns the picture: over devices and models, or over the settings of one plan. matplotlib is optional."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from brim.errors import ConfigError

_FORMATS = (".png", ".svg", ".pdf")
# bottom to top, from what nothing changes to what settings leave
_PARTS = {
    "context": ("context and libraries", "#7f7f7f"),
    "weights": ("weights", "#1f77b4"),
    "buffers": ("buffers", "#bcbd22"),
    "workspace": ("workspace", "#ff7f0e"),
    "activations": ("kernels, rounding", "#8c564b"),
    "graphs": ("graphs", "#9467bd"),
    "kv_cache": ("KV cache", "#2ca02c"),
}
_GIB = 1 << 30


def draw(found: dict[str, Any], path: Path) -> None:
    """Write the picture of `brim plan --json`'s document. Raises ConfigError: no matplotlib, an ending nobody knows, no plan."""
    if path.suffix.lower() not in _FORMATS:
        raise ConfigError(f"--plot {path} must end in {', '.join(_FORMATS)}.")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib; install it with: pip install 'brim[plot]'") from None
    bars = bars_of(found)
    if not bars:
        raise ConfigError("--plot has nothing to draw: no plan fits.")
    figure = Figure(figsize=(8, 1.4 + 0.42 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    for row, (_, parts, tokens) in enumerate(bars):
        left = 0.0
        for category, (_, colour) in _PARTS.items():
            width = parts.get(category, 0) / _GIB
            axes.barh(row, width, left=left, color=colour, height=0.7)
            left += width
        axes.text(left, row, f" {tokens:,} tokens", va="center", fontsize=8)
    for name, colour in _PARTS.values():
        axes.barh(0, 0, color=colour, label=name)
    axes.set_yticks(range(len(bars)), [label for label, _, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, axes.get_xlim()[1] * 1.2)  # room for the figures beside the bars
    axes.set_xlabel("GiB")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ConfigError(f"--plot {path} cannot be written: {error.strerror}.") from error


def bars_of(found: dict[str, Any]) -> list[tuple[str, dict[str, int], int]]:
    """(label, bytes by category, KV tokens): one a plan; of a single plan, it and each change of a setting. Only what fits."""
    plans = found["plans"]
    if len(plans) > 1:
        return [(f"{_last(plan['model'])}\n{plan['device']}", plan["bytes"], plan["kv_tokens"]) for plan in plans if plan["fits"]]
    (plan,) = plans
    if not plan["fits"]:
        return []
    changes = [(one["flags"], one["bytes"], one["kv_tokens"]) for one in plan["changes"] if not one["refused"]]
    return [("as it is", plan["bytes"], plan["kv_tokens"]), *changes]


def _last(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2]
