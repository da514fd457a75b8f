"""The process that measures how fast memory can be read here, so that its buffer is never the engine's. Not a verb."""

from __future__ import annotations

import sys
import time

import torch

READS = 12


def main() -> int:
    """Print bytes per second: the best of some reads of the whole buffer (a limit is what can be reached, not the mean).

    Arguments: device, threads, buffer bytes. Elsewhere than on a CPU a copy is timed, which reads and writes each byte.
    """
    device, num_threads, buffer_bytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(num_threads)
    source = torch.ones(buffer_bytes // 8, dtype=torch.int64, device=device)
    target = None if source.is_cpu else torch.empty_like(source)
    best_s = float("inf")
    for _ in range(READS):
        started = time.perf_counter()
        if target is None:
            source.sum()
        else:
            target.copy_(source)
            torch.accelerator.synchronize()
        best_s = min(best_s, time.perf_counter() - started)
    print((1 if target is None else 2) * buffer_bytes / best_s)
    return 0


if __name__ == "__main__":
    sys.exit(main())
