"""Opening the in-process engine for a verb. Owns the step from flags to an `LLM`; the only place in cli/ that imports it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from brim.cli.options import build_config, settings_of
from brim.cli.progress import ProgressLine
from brim.importing import begin_driver, collector_at_rest

if TYPE_CHECKING:
    from brim.llm import LLM


def open_llm(
    model: str | None, settings: dict[str, Any], *, quiet: bool = False, defaults: Mapping[str, Any] | None = None
) -> LLM:
    """The engine for `model` with these flags, ready; progress goes to stderr. The caller closes it (context manager).

    `defaults` are a verb's own, for settings that nobody chose. Settings are checked before torch is imported, so a wrong
    flag is answered at once. Raises BrimError.
    """
    config = build_config(model, settings)
    begin_driver()
    with collector_at_rest(for_good=True):
        from brim import LLM

    with ProgressLine(quiet=quiet) as progress:
        return LLM(config.model.model, on_progress=progress, **{**(defaults or {}), **settings_of(config)})
