"""The process that opens every registered platform, one a step, so that one that kills shows as such. Torch-free, not a verb."""

from __future__ import annotations

import json
import sys
from typing import Any

from brim.engine.trials import TrialStep, answer_trials
from brim.errors import BrimError
from brim.platforms.detect import detect, registered


def try_platform(name: str) -> dict[str, Any]:
    """Whether it opens, and what it is or why not in one sentence."""
    try:
        platform = detect(name)
    except BrimError as error:
        return {"name": name, "opened": False, "reason": str(error)}
    try:
        device = str(platform.describe().get("device", ""))
    except Exception as error:  # a third party's
        return {"name": name, "opened": False, "reason": f"it opens, but describe() fails: {error}"}
    return {"name": name, "opened": True, "reason": device}


def main() -> int:
    """Answer for every name that is not done yet."""
    done = json.loads(sys.argv[1])["done"]
    answer_trials([TrialStep(name) for name in sorted(registered())], done, lambda: try_platform)
    return 0


if __name__ == "__main__":
    sys.exit(main())
