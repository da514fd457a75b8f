"""GET /memory/live: everything the memory page shows, as one JSON document. Owns its fields; every figure is somebody's else.

The same fields in every state of the server; what nobody knows now is null. docs/memory-page.md lists them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
from fastapi import Response

from brim.config.schema import BrimConfig
from brim.engine.start_watch import PhaseSoFar
from brim.errors import EngineDead
from brim.server.api_errors import JSON, ApiError
from brim.server.engine_account import EngineAccount
from brim.server.explanations import explain
from brim.server.metrics import ServerMetrics
from brim.server.seams import EngineClient

LIVE_PATH = "/memory/live"
_MOST_AGE_S = 0.9  # of the engine's figures: pages ask once a second, and all of them together cost what one does
# Of what the engine says of itself: what a reader of its memory wants to know.
_INFO = (
    "model", "family", "num_parameters", "dtype", "device", "kernels", "kernels_reason", "compile", "graph_mode",
    "graph_mode_reason", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "full_length_requests", "ready_s", "avoided",
)  # fmt: skip


class LiveServer:
    """The part of the document that is the server's own, and the document while there is no engine yet."""

    def __init__(self, names: Sequence[str], *, takes_chat: bool | None = None) -> None:
        self._server = {"names": list(names), "version": version("brim"), "takes_chat": takes_chat}

    @classmethod
    def of_config(cls, config: BrimConfig) -> LiveServer:
        """Before the model's files are read: whether it holds conversations is not known yet."""
        return cls(config.model.served_model_name or (config.model.model,))

    def starting(self, reason: str, phases: Sequence[PhaseSoFar]) -> dict[str, Any]:
        """While the engine starts for the first time."""
        engine = {"state": "starting", "reason": reason, "restarts": 0, "phases": phases_json(phases)}
        return self.document(time.time(), engine)

    def document(self, taken_s: float, engine: dict[str, Any], **known: Any) -> dict[str, Any]:
        """All fields; those not in `known` are null."""
        parts = dict.fromkeys(("info", "memory", "requests", "tokens", "first_token"))
        return {"taken_s": taken_s, "server": self._server, "engine": engine, **parts, **known}


class LiveView:
    """The document over an engine, however it is."""

    def __init__(self, engine: EngineClient, server: LiveServer, account: EngineAccount, metrics: ServerMetrics) -> None:
        self._engine = engine
        self._server = server
        self._account = account
        self._metrics = metrics

    async def document(self) -> dict[str, Any]:
        """Asks the engine at most about once a second, whoever reads."""
        await self._account.refresh(_MOST_AGE_S)
        memory, stats, info = self._account.memory, self._account.stats, self._engine.info
        serving = self._engine.is_healthy
        engine = {
            "state": "serving" if serving else "down",
            "reason": self._account.reason if serving else self._engine.reason,
            "restarts": self._engine.num_restarts,
            "phases": phases_json(() if serving else self._engine.start_phases),
        }
        return self._server.document(
            self._account.taken_s,
            engine,
            info={name: info.get(name) for name in _INFO} | {"has_certificate": bool(info.get("certificate"))},
            memory=memory_json(memory) if memory else None,
            requests=stats or None,
            tokens={"prompt": self._metrics.num_prompt_tokens, "generated": self._metrics.num_new_tokens},
            first_token=self._metrics.first_token,
        )

    async def certificate(self) -> Response:
        """The certificate of the start that serves now, as a file to keep. Raises ApiError where there is none of it."""
        if not self._engine.is_healthy:
            raise EngineDead(self._engine.reason)
        path, found = self._engine.info.get("certificate"), None
        if path:
            try:
                found = Path(path).read_bytes()
            except OSError:
                path = None
        if found is None:
            raise _no_certificate("This start could write none to the cache folder, or it was removed.")
        await self._account.refresh(_MOST_AGE_S)
        if json.loads(found).get("phases") != self._account.memory.get("phases"):
            raise _no_certificate("A later start of this model on this machine replaced it.")
        headers = {"Content-Disposition": f'attachment; filename="brim-{Path(str(path)).name}"', "Cache-Control": "no-store"}
        return Response(found, headers=headers, media_type=JSON)


def live_response(document: dict[str, Any]) -> Response:
    """As an answer that is never kept."""
    return Response(msgspec.json.encode(document), headers={"Cache-Control": "no-store"}, media_type=JSON)


def memory_json(memory: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's account, each line of the ledger with a sentence on what it is; phases without lines of their own."""
    ledger = [{**line, "explanation": explain(line["category"], line["owner"])} for line in memory.get("ledger", ())]
    phases = [{name: value for name, value in phase.items() if name != "ledger"} for phase in memory.get("phases", ())]
    return {**memory, "ledger": ledger, "phases": phases}


def phases_json(phases: Sequence[PhaseSoFar]) -> list[dict[str, Any]]:
    """A start under way: each phase with its seconds so far; fraction of the last one's work, where it is known."""
    return [
        {"name": one.name, "text": one.text, "fraction": one.fraction, "seconds": round(one.seconds, 3), "is_done": one.is_done}
        for one in phases
    ]


def _no_certificate(why: str) -> ApiError:
    return ApiError(404, f"There is no certificate of this start. {why}", code="not_found")
