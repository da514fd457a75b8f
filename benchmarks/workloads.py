"""The workloads of the recorded results. Their definition is the package's own, so that `brim bench` runs the same."""

from brim.cli.workloads import MIXED_16_LENGTHS, MIXED_16_NEW_TOKENS, Workload, equal_prompts, mixed_16, workload_w

__all__ = ["MIXED_16_LENGTHS", "MIXED_16_NEW_TOKENS", "Workload", "equal_prompts", "mixed_16", "workload_w"]
