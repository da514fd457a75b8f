"""Launches both ends of a captured decode step. Owns `FeedLauncher`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from brim.kernels.base import FedStep, HostFeed
from brim.kernels.triton.fed_steps import begin_decodes_kernel, end_decodes_kernel
from brim.kernels.triton.launch import Launch
from brim.kernels.triton.tuning import TABLE_FAR, TABLE_NEAR, TABLE_WARPS, next_power_of_2, norm_warps


@dataclass(frozen=True, slots=True)
class FeedLauncher:
    """One program a row; nothing is held."""

    start: Launch

    def begin(self, feed: HostFeed, step: FedStep) -> None:
        """See `Kernels.begin_decodes`: one launch a KV group."""
        sampling = step.sampling
        for group, (source, table, slots) in enumerate(zip(feed.tables, step.tables, step.slots, strict=True)):
            self.start(
                begin_decodes_kernel, (len(step.ids),), feed.turn, feed.ids, feed.rows, feed.seeds, feed.seq_lens, feed.top_k,
                feed.temperature, feed.top_p, feed.min_p, source, step.ids, step.rows, sampling.seed, sampling.position,
                step.seq_lens, sampling.top_k, sampling.temperature, sampling.top_p, sampling.min_p, step.positions, slots, table,
                step.last_ids, feed.ids.stride(0), table.stride(0), BLOCK_SIZE=step.block_size, NEAR=TABLE_NEAR,
                FAR=TABLE_FAR, FIRST=not group, num_warps=TABLE_WARPS,
            )  # fmt: skip

    def end(self, feed: HostFeed, step: FedStep, hidden: Tensor, ids: Tensor) -> None:
        """See `Kernels.end_decodes`."""
        width = hidden.shape[1]
        self.start(
            end_decodes_kernel, (len(ids),), feed.turn, hidden, ids, step.rows, step.last_ids, feed.sampled, hidden.stride(0),
            feed.ids.stride(0), len(feed.ids), WIDTH=width, BLOCK=next_power_of_2(width), num_warps=norm_warps(width),
        )  # fmt: skip
