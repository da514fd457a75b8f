"""One rank of a start on the host: `python -m tests.e2e.rank_main JSON`. Prints what it came to as JSON.

JSON: index, size, port, timeout_s, model, room_bytes (the cap beside what the process holds already), and a fault: phase, how.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from brim.config.model_source import open_model
from brim.config.resolve import resolve
from brim.engine.messages import StartupProgress
from brim.errors import BrimError
from brim.kernels.torch_ref import TorchKernels
from brim.parallel.gloo_ranks import GlooRanks
from brim.platforms.cpu import CpuPlatform
from brim.worker.startup import start_worker


def run(asked: dict[str, Any]) -> dict[str, Any]:
    """Meet, start, and say how it ended."""

    def on_progress(progress: StartupProgress) -> None:
        if progress.phase == asked.get("phase"):
            if asked["how"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("scripted")

    try:
        ranks = GlooRanks(asked["index"], asked["size"], port=asked["port"], timeout_s=asked["timeout_s"])
        platform = CpuPlatform()
        memory = str(platform.reading().ours_bytes + asked["room_bytes"])
        limits = {"max_model_len": asked["max_model_len"], "max_num_seqs": 3, "max_num_batched_tokens": 64}
        config = resolve({"model": asked["model"], "load_format": "dummy", "memory": memory, **limits})
        worker = start_worker(config, platform, lambda _: TorchKernels(), open_model(config.model), on_progress, ranks=ranks)
    except (BrimError, ValueError) as error:
        return {"error": type(error).__name__, "message": str(error)}
    plan = worker.ready.plan
    found = {"blocks": worker.committed_blocks, "capacity": worker.ready.capacity_blocks, "length": plan.limits.max_model_len}
    over_bytes = worker.ledger.held_bytes - plan.cap_bytes
    worker.close()
    return {**found, "over_bytes": over_bytes}


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
