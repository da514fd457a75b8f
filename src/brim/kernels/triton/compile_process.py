"""`python -m brim.kernels.triton.compile_process`: compiles kernel variants into Triton's cache. Started by `compile_pool`.

The first line of standard input names the target, each further one is a variant; each is answered by a line, empty where it
was made, else saying why not. When the input ends, so does the process, at once and whatever it was doing: its parent closed it
or is gone. It imports no torch and opens no device.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading

from triton.backends.compiler import GPUTarget

from brim.kernels.triton.variant import Variant


def _forward(lines: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


def main() -> None:
    """Compile until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # compilers may talk
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_forward, args=(lines,), daemon=True).start()
    target = GPUTarget(*json.loads(lines.get()))
    while True:
        text = lines.get()
        try:
            Variant(json.loads(text)).compile(target)
            reason = ""
        except Exception as error:  # whatever a compiler raises: the engine's process will meet it again, or not
            reason = f"{type(error).__name__}: {error}".replace("\n", " ")
        print(reason, file=answers, flush=True)


if __name__ == "__main__":
    main()
