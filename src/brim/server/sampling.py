"""From a request's fields to SamplingParams. Owns the translation of OpenAI's names and defaults; no text, no HTTP."""

from __future__ import annotations

from brim.engine.sampling_params import SamplingParams
from brim.errors import InvalidParameter
from brim.server.openai_types import ChatRequest, CompletionRequest, GenerationRequest

DEFAULT_COMPLETION_TOKENS = 16
_MOST_PRIORITY = 1_000_000


def completion_params(request: CompletionRequest) -> SamplingParams:
    """Of a text completion. With echo, max_tokens 0 asks for the prompt alone: one token is made and not shown."""
    max_tokens = DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    if request.echo and max_tokens == 0:
        max_tokens = 1
    prompt_logprobs = request.prompt_logprobs
    if request.echo and request.logprobs is not None:
        prompt_logprobs = max(request.logprobs, prompt_logprobs or 0)
    return _params(request, max_tokens, request.logprobs, prompt_logprobs)


def chat_params(request: ChatRequest) -> SamplingParams:
    """Of a conversation."""
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidParameter("top_logprobs needs logprobs true.", param="top_logprobs")
    max_tokens = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    num_best = (request.top_logprobs or 0) if request.logprobs else None
    return _params(request, max_tokens, num_best, request.prompt_logprobs)


def _params(
    request: GenerationRequest, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParams:
    if request.stream_options is not None and not request.stream:
        raise InvalidParameter("stream_options needs stream true.", param="stream_options")
    if abs(request.priority) > _MOST_PRIORITY:
        raise InvalidParameter(f"priority must be from -{_MOST_PRIORITY} to {_MOST_PRIORITY}.", param="priority")
    return SamplingParams(
        n=request.n,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias={_token_id(key): bias for key, bias in request.logit_bias.items()},
        seed=request.seed,
        max_tokens=max_tokens,
        min_tokens=request.min_tokens,
        stop=(request.stop,) if isinstance(request.stop, str) else tuple(request.stop),
        stop_token_ids=tuple(request.stop_token_ids),
        include_stop_str_in_output=request.include_stop_str_in_output,
        ignore_eos=request.ignore_eos,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        skip_special_tokens=request.skip_special_tokens,
    )


def _token_id(key: str) -> int:
    """logit_bias names token ids as JSON keys."""
    if not key.isascii() or not key.isdigit() or len(key) > 10:
        raise InvalidParameter(f"logit_bias must name token ids, not {key[:32]!r}.", param="logit_bias")
    return int(key)
