"""Brim: an LLM inference and serving engine that measures memory instead of guessing it.

    from brim import LLM, SamplingParams

Importing this package is instant; `LLM` imports torch when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from brim.engine.sampling_params import SamplingParams
from brim.errors import BrimError
from brim.importing import collector_at_rest

if TYPE_CHECKING:
    from brim.llm import LLM, RequestOutput

__all__ = ["LLM", "BrimError", "RequestOutput", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name in ("LLM", "RequestOutput"):
        with collector_at_rest():
            from brim import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'brim' has no attribute '{name}'")
