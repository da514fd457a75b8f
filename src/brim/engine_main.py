"""`python -m brim.engine_main`: the engine's process behind a server. Started by `engine.launched_process`, never by people."""

from __future__ import annotations

import sys

from brim.importing import begin_driver, collector_at_rest


def main() -> int:
    """Serve the engine that `runtime` builds until told to stop."""
    begin_driver()
    with collector_at_rest(for_good=True):
        from brim.engine.engine_process import run_engine_process
        from brim.runtime import build_engine_core
    return run_engine_process(build_engine_core)


if __name__ == "__main__":
    sys.exit(main())
