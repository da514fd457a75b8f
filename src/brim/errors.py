"""The one error tree of Brim.

    BrimError
     +- ConfigError             a setting is wrong: unknown key, bad value, clashing flags
     +- ModelError              the model cannot be used
     |   +- ModelNotFound       no such folder, file or hub id
     |   +- UnsupportedModel    an architecture, quantisation or feature Brim does not have
     |   +- BrokenModel         truncated or inconsistent files
     |   +- TokenizerError      tokenizer or chat template missing or misbehaving
     +- MemoryBudgetError       it does not fit; carries the ledger and the nearest settings that would
     +- OutOfDeviceMemory       an allocation failed while working; carries the ledger
     +- DeviceError             the accelerator misbehaved
     |   +- DeviceLost          the accelerator is gone; only a new process helps
     +- RequestError            one request is wrong (HTTP 4xx); the engine goes on
     |   +- InvalidParameter    a field's value is out of range or of the wrong type
     |   +- PromptTooLong       more tokens than the context holds
     +- EngineError             the engine failed
         +- EngineDead          the engine process died; in-flight requests were failed
         +- RankFailed          another rank failed or is gone; says which, and why
         +- RequestFailed       the step that served this request failed

Owns the exception types and nothing else. Foreign exceptions are mapped to these at the boundary with `raise ... from`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from brim.memory.ledger import Ledger


class BrimError(Exception):
    """Base of every error Brim raises on purpose. `str(error)` is one clear sentence plus what to do."""


class ConfigError(BrimError):
    """A setting is wrong; the message names it and, for unknown keys, the nearest known one."""


class ModelError(BrimError):
    """The model cannot be used."""


class ModelNotFound(ModelError):
    """No such folder, file or hub id."""


class UnsupportedModel(ModelError):
    """An architecture, quantisation or feature that Brim does not have."""


class BrokenModel(ModelError):
    """Files are truncated, unreadable or contradict each other."""


class TokenizerError(ModelError):
    """The tokenizer or chat template is missing or misbehaves."""


class MemoryBudgetError(BrimError):
    """The requested settings do not fit under the cap.

    `ledger` is the account that shows why; `nearest` lists settings that would fit, best first, as flag strings.
    """

    def __init__(self, message: str, *, ledger: Ledger | None = None, nearest: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.ledger = ledger
        self.nearest = tuple(nearest)

    def __str__(self) -> str:
        text = super().__str__()
        if self.nearest:
            text += " Settings that would fit: " + "; or ".join(self.nearest) + "."
        return text


class OutOfDeviceMemory(BrimError):
    """An allocation failed while working; `ledger` (if known) says who held what."""

    def __init__(self, message: str, *, ledger: Ledger | None = None, nearest: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.ledger = ledger
        self.nearest = tuple(nearest)


class DeviceError(BrimError):
    """The accelerator misbehaved."""


class DeviceLost(DeviceError):
    """The accelerator is gone for this process; only a new process can use it again."""


class RequestError(BrimError):
    """One request is wrong. `param` names the offending field (OpenAI's `param`)."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class InvalidParameter(RequestError):
    """A field's value is out of range or of the wrong type."""


class PromptTooLong(RequestError):
    """The prompt (plus at least one new token) passes the context length."""


class EngineError(BrimError):
    """The engine failed."""


class RankFailed(EngineError):
    """Another rank failed or is gone: this one cannot go on without it. The message names the rank and its reason."""


class EngineDead(EngineError):
    """The engine process died; what was in flight has been failed."""


class RequestFailed(EngineError):
    """The step that served this request failed; the engine goes on."""


def first_line(error: BaseException) -> str:
    """What a foreign error says first."""
    return (str(error).splitlines() or [""])[0]
