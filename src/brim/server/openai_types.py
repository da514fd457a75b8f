"""The requests of the API: fields, their types, and which of OpenAI's others are refused or ignored. Owns no behaviour.

Names and defaults are OpenAI's; below them vLLM's. Wrong values of the right type are `SamplingParams`' to refuse.
"""

from __future__ import annotations

from typing import Any

import msgspec

Stop = str | list[str]
Prompt = str | list[int | str | list[int]]  # text, ids, or several of either

# Accepted without effect: bookkeeping of the caller's, or hints that cannot change the text.
IGNORED = frozenset(
    {
        "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention", "request_id", "spaces_between_special_tokens", "return_tokens_as_token_ids", "cache_salt",
    }
)  # fmt: skip
_NO_TOOLS = "this server does not call tools; leave it out and describe the tool in the messages."
_NO_CONSTRAINTS = "outputs cannot be constrained to a grammar or schema; leave it out and ask for the form in the prompt."
_NO_MEDIA = "this server takes and gives text only; leave it out."
_NO_BEAMS = "there is no beam search; leave it out and sample with 'n'."
_NO_TEMPLATES = "the chat template is the server's; start it with --chat-template."
_LEAVE_OUT = "leave it out."
# Fields that would change the answer -> what to do instead.
REFUSED = {
    "tools": _NO_TOOLS, "tool_choice": _NO_TOOLS, "functions": _NO_TOOLS, "function_call": _NO_TOOLS,
    "response_format": _NO_CONSTRAINTS, "guided_json": _NO_CONSTRAINTS, "guided_regex": _NO_CONSTRAINTS,
    "guided_choice": _NO_CONSTRAINTS, "guided_grammar": _NO_CONSTRAINTS, "structured_outputs": _NO_CONSTRAINTS,
    "modalities": _NO_MEDIA, "audio": _NO_MEDIA, "prompt_embeds": "send text or token ids as 'prompt'.",
    "best_of": _NO_BEAMS, "use_beam_search": _NO_BEAMS, "length_penalty": _NO_BEAMS,
    "chat_template": _NO_TEMPLATES, "documents": "put the documents into the messages.",
    "suffix": "text cannot be inserted before a suffix; leave it out.",
    "continue_final_message": "end with a user's message, or use /v1/completions.",
    "reasoning_effort": _LEAVE_OUT, "verbosity": _LEAVE_OUT, "prediction": _LEAVE_OUT, "web_search_options": _LEAVE_OUT,
    "truncate_prompt_tokens": "shorten the prompt before sending it.", "bad_words": "use 'logit_bias'.",
    "allowed_token_ids": "use 'logit_bias'.", "logits_processors": _LEAVE_OUT, "mm_processor_kwargs": _NO_MEDIA,
}  # fmt: skip


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """include_usage: a last chunk with the usage. continuous_usage_stats (vLLM): the usage so far in every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False  # accepted; nothing is padded


class GenerationRequest(msgspec.Struct, kw_only=True):
    """What both kinds of completion share. None in the JSON means the default."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = 1
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] = {}
    seed: int | None = None
    stop: Stop = []
    # vLLM's
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    prompt_logprobs: int | None = None
    priority: int = 0


class CompletionRequest(GenerationRequest, kw_only=True):
    """POST /v1/completions. logprobs: how many alternatives of each token."""

    prompt: Prompt
    echo: bool = False
    logprobs: int | None = None
    add_special_tokens: bool = True


class ChatRequest(GenerationRequest, kw_only=True):
    """POST /v1/chat/completions. max_completion_tokens wins over max_tokens; neither: as many as the context holds."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = {}


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /tokenize: a prompt, or messages by the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /detokenize: ids to text."""

    model: str | None = None
    tokens: list[int]
