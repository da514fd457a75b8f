"""`python -m brim.calibration_main`: one start that is measured, in a process of its own. Started by `planning.calibrate`."""

from __future__ import annotations

import json
import sys

from brim.planning import measure_start


def main() -> int:
    """Settings as JSON on standard input; what the start took as the last line of standard output."""
    print(json.dumps(measure_start(json.load(sys.stdin))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
