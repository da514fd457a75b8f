"""What crosses between a front end (HTTP server, LLM) and the engine core. Owns the message types: msgpack by msgspec, no
pickle."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from brim.config.avoid import StartUses
from brim.engine.sampling_params import SamplingParams
from brim.memory.ledger import Ledger

FinishReason = Literal["stop", "length", "abort", "error"]


class AddRequest(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Start one sequence. n > 1 is expanded by the front end into n of these (same prompt, own ids and seeds)."""

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    arrival_s: float
    priority: int = 0


class AbortRequest(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Stop a sequence (client gone, or its stop string was found by the front end); unknown ids are ignored."""

    request_id: str


class ControlCall(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Ask for something beside requests: "memory" (report), "stats", "drain", "shutdown", "resize" ..."""

    call_id: int
    name: str
    arguments: dict[str, Any] = {}


class PositionLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Same meaning as engine.step.TokenLogprobs, on the wire."""

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


class SequenceOutput(msgspec.Struct, frozen=True, array_like=True):
    """What one step gave one sequence. finish_reason None: more comes. error: set with finish_reason "error" (or a refusal)."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    logprobs: list[PositionLogprobs] | None = None
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    error_kind: str | None = None


class StepOutputs(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """All sequence outputs of one step."""

    outputs: list[SequenceOutput]


class ControlReply(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The answer to a ControlCall."""

    call_id: int
    result: dict[str, Any]
    error: str | None = None


class EngineReady(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The engine serves. `info`: max_model_len, vocab_size, kv_tokens, model names, eos ids, the memory report ..."""

    info: dict[str, Any]


class EngineFailed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The engine could not start or died of an error it could still report. kind: the BrimError subclass name.

    nearest and ledger: of a memory error."""

    kind: str
    message: str
    nearest: tuple[str, ...] = ()
    ledger: Ledger | None = None


class StartupProgress(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A phase of start-up began, advanced or ended: for people, on stderr, and for who watches over the start.

    identity: what the start is of (`config.avoid_record.identity_of`); uses: the features it uses; None: as said before."""

    phase: str
    text: str
    fraction: float | None = None
    identity: dict[str, str] | None = None
    uses: StartUses | None = None


ToEngine = AddRequest | AbortRequest | ControlCall
FromEngine = StepOutputs | ControlReply | EngineReady | EngineFailed | StartupProgress
