"""The figures of a suite under the two roofs of the device. Owns the picture; matplotlib is optional."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from brim.errors import ConfigError

_MARKERS = "osD^vP"


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Attained operations a second over operations a byte, both logarithmic. Raises ConfigError: no matplotlib, a bad ending."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib; install it with: pip install 'brim[plot]'") from None
    bandwidth, products = record["limits"]["bandwidth_bytes_per_s"], record["limits"]["matmul_flops"]
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    span = [0.1, products / bandwidth, 1e5]
    axes.loglog(span, [min(x * bandwidth, products) for x in span], color="black", linewidth=1.5)
    axes.annotate(f"memory {bandwidth / 1e12:.3g} TB/s", (0.12, 0.4 * bandwidth), fontsize=8)
    axes.annotate(f"products {products / 1e12:.3g} TFLOP/s", (span[1], products * 1.1), fontsize=8)
    for marker, (name, found) in zip(_MARKERS, record["models"].items(), strict=False):
        rows = [row for row in found["figures"] if row["flops"] and row["moved_bytes"] and row["seconds"]]
        points = [(row["flops"] / row["moved_bytes"], row["flops"] / row["seconds"]) for row in rows]
        axes.scatter(*zip(*points, strict=True), marker=marker, label=name) if points else None
        for row, point in zip(rows, points, strict=True):
            axes.annotate(
                f"{row['name']}: {row['limit_share']:.0%}", point, fontsize=7, xytext=(5, -4), textcoords="offset points"
            )
    axes.set_xlabel("operations a byte")
    axes.set_ylabel("operations a second")
    axes.set_title(f"{record['device'].get('device')}: attained, and share of the limit")
    axes.legend(loc="lower right")
    axes.grid(which="major", linewidth=0.3)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path} cannot be written: {error}.") from error
