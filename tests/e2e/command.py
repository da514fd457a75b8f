"""How the tests start their processes."""

from __future__ import annotations

import sys

ENGINE = (sys.executable, "-W", "error", "-m", "tests.e2e.fake_engine_main")
SERVER = (sys.executable, "-W", "error", "-m", "tests.e2e.fake_server_main")
