"""What the engine said of itself last. Owns how often it is asked: readers share one answer, so that many cost what one does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from brim.errors import BrimError
from brim.server.seams import EngineClient


class EngineAccount:
    """stats, memory: as of taken_s (seconds since 1970); both empty where the engine did not answer, `reason` says why."""

    def __init__(self, engine: EngineClient) -> None:
        self.stats: Mapping[str, Any] = {}
        self.memory: Mapping[str, Any] = {}
        self.reason = ""
        self.taken_s = 0.0
        self._engine = engine
        self._was_healthy = False
        self._asking = asyncio.Lock()

    async def refresh(self, most_age_s: float = 0.0) -> None:
        """Ask the engine, unless what it said is younger than most_age_s."""
        async with self._asking:
            is_healthy = self._engine.is_healthy
            if 0 <= time.time() - self.taken_s < most_age_s and is_healthy == self._was_healthy:
                return
            self._was_healthy, self.reason = is_healthy, ""
            try:
                self.stats, self.memory = await self._engine.stats(), await self._engine.memory()
            except BrimError as error:
                self.stats, self.memory, self.reason = {}, {}, str(error)
            self.taken_s = time.time()
