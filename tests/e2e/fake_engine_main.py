"""An engine process whose model is letters: what `brim.engine_main` is to the real one. Model "slow": 20 ms a step."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.unit.server.letters import build_letter_core

from brim.config.schema import BrimConfig
from brim.engine.core import EngineCore
from brim.engine.engine_process import run_engine_process
from brim.engine.messages import StartupProgress


def build(config: BrimConfig, on_progress: Callable[[StartupProgress], None]) -> tuple[EngineCore, dict[str, Any]]:
    """Model "silent" dies without a word, "waiting" waits until a file is gone; else such a file makes one start fail."""
    assert not config.server.api_keys, "keys are the server's alone"
    if config.model.model == "silent":
        os._exit(7)
    if config.model.model == "waiting":
        while Path(config.model.revision or "").is_file():
            time.sleep(0.01)
    if config.model.revision is not None and (once := Path(config.model.revision)).exists():
        once.unlink()
        raise OSError("not this time")
    core, info = build_letter_core(config, on_progress, step_s=0.02 if config.model.model == "slow" else 0.0)
    return core, {**info, "pid": os.getpid()}


if __name__ == "__main__":
    sys.exit(run_engine_process(build))
