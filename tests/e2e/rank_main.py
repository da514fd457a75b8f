"""One rank of a start on the host, as a process of its own: what it came to, through a pipe.

What is asked of it: index, size, port, timeout_s, model, max_model_len, room_bytes (the cap beside what the process holds
already), and a fault: phase, how ("raise", "kill").
"""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import Connection
from typing import Any

from brim.config.model_source import open_model
from brim.config.resolve import resolve
from brim.engine.messages import StartupProgress
from brim.errors import BrimError
from brim.kernels.torch_ref import TorchKernels
from brim.parallel.gloo_ranks import GlooRanks
from brim.platforms.cpu import CpuPlatform
from brim.worker.startup import start_worker


def main(asked: dict[str, Any], pipe: Connection) -> None:
    """Meet, start, and say how it ended."""
    pipe.send(run(asked))


def run(asked: dict[str, Any]) -> dict[str, Any]:
    """The figures of the worker, or the error."""

    def on_progress(progress: StartupProgress) -> None:
        if progress.phase == asked.get("phase"):
            if asked["how"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("scripted")

    ranks = GlooRanks(asked["index"], asked["size"], port=asked["port"], timeout_s=asked["timeout_s"])
    platform = CpuPlatform()
    memory = str(platform.reading().ours_bytes + asked["room_bytes"])
    limits = {"max_model_len": asked["max_model_len"], "max_num_seqs": 3, "max_num_batched_tokens": 64}
    config = resolve({"model": asked["model"], "load_format": "dummy", "memory": memory, **limits})
    try:
        worker = start_worker(config, platform, lambda _: TorchKernels(), open_model(config.model), on_progress, ranks=ranks)
    except (BrimError, ValueError) as error:
        return {"error": type(error).__name__, "message": str(error)}
    finally:
        ranks.close()
    plan = worker.ready.plan
    found = {"blocks": worker.committed_blocks, "capacity": worker.ready.capacity_blocks, "length": plan.limits.max_model_len}
    over_bytes = worker.ledger.held_bytes - plan.cap_bytes
    worker.close()
    return {**found, "over_bytes": over_bytes}
