"""The process that `brim bench startup` times: open the engine, generate one token, say when. Not a verb."""

from __future__ import annotations

import json
import resource
import sys
import time

from brim.cli.engine import open_llm
from brim.cli.errors import report_error
from brim.engine.sampling_params import SamplingParams
from brim.errors import BrimError


def main() -> int:
    """Print one JSON line: the monotonic times of ready and of the first token, this process's peak RSS, the engine's info."""
    task = json.loads(sys.argv[1])
    try:
        with open_llm(task["model"], task["settings"], quiet=True) as llm:
            ready_at = time.monotonic()
            llm.generate([[1, 2, 3, 4]], SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))
            token_at = time.monotonic()
            info = llm.info
    except BrimError as error:
        report_error(error)
        return 1
    peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"ready_at": ready_at, "token_at": token_at, "peak_rss_bytes": peak_rss_bytes, "info": info}, default=str))
    return 0


if __name__ == "__main__":
    sys.exit(main())
