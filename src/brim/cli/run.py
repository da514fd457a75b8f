"""`brim run`: one completion, or a conversation, with the engine in this process.

Stdout carries the completion alone, byte for byte as the model wrote it, streamed; when stdout is a terminal a newline
follows so that the shell's prompt starts on its own line, otherwise nothing is added. All else goes to stderr.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from brim.cli import engine
from brim.cli.options import ENGINE_GROUPS, with_settings
from brim.errors import ConfigError, InvalidParameter

if TYPE_CHECKING:
    from brim.engine.sampling_params import SamplingParams
    from brim.llm import LLM

DEFAULT_MAX_TOKENS = 512
RUN_DEFAULTS = {"max_num_seqs": 4}  # one person asks: less KV cache, a faster start


@with_settings(groups=ENGINE_GROUPS, without=("seed",))
def run(
    *,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A local folder, a .gguf file, a hub id, or demo.")],
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="- reads it from stdin. Without one: a conversation.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 always takes the likeliest token. Default: 1.")] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens to generate.")] = DEFAULT_MAX_TOKENS,
    top_p: Annotated[float | None, typer.Option(help="Sample from the likeliest tokens of this total probability.")] = None,
    top_k: Annotated[int | None, typer.Option(metavar="N", help="Sample from the N likeliest tokens.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Least probability, relative to the likeliest token's.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="More than 1 holds back what was said before.")] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after end-of-sequence.")] = False,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed of the sampling (and of dummy weights).")] = None,
    system: Annotated[str | None, typer.Option(help="System message; needs a chat template.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Print the completion when it is whole.")] = False,
    memory_report: Annotated[bool, typer.Option("--memory-report", help="Print the memory ledger on stderr at the end.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print the start-up report and the speed on stderr.")] = False,
    settings: dict[str, Any],
) -> None:
    """Answer a prompt, or hold a conversation.

    The completion alone goes to stdout. A model with a chat template answers PROMPT as a user's message; a base model (or
    --raw) continues it as text.
    """
    text = _read_prompt(prompt)
    params = _sampling_params(
        temperature=temperature, max_tokens=max_tokens, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed,
        repetition_penalty=repetition_penalty, stop=tuple(stop or ()), ignore_eos=ignore_eos,
    )  # fmt: skip
    if as_json and text is None:
        raise ConfigError("--json needs a PROMPT; a conversation has no single answer.")
    if seed is not None:
        settings["seed"] = seed
    with engine.open_llm(model, settings, defaults=RUN_DEFAULTS) as llm:
        if verbose:
            print(llm.startup_report(), file=sys.stderr)
        elif sys.stderr.isatty() and not as_json:
            from brim.cli.tables import print_summary

            print_summary(llm.memory(), llm.info.get("ready_s"))
        is_chat = _wants_chat(llm, raw=raw, system=system)
        if text is None:
            from brim.cli.conversation import hold_conversation

            hold_conversation(llm, params, system=system, is_chat=is_chat)
        else:
            prompt_or_messages = _messages(text, system) if is_chat else text
            _answer(llm, prompt_or_messages, params, as_json=as_json, stream=not no_stream, verbose=verbose)
        if memory_report:
            from brim.cli.tables import print_memory

            print(file=sys.stderr)
            print_memory(llm.memory())


def _read_prompt(prompt: str | None) -> str | None:
    """The prompt as text; None where a person sits at the terminal and gave none. One trailing newline of stdin is dropped."""
    if prompt is not None and prompt != "-":
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise InvalidParameter("The prompt is not valid UTF-8.", param="prompt") from error
        return prompt
    if prompt is None and sys.stdin.isatty():
        return None
    data = sys.stdin.buffer.read()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InvalidParameter(f"The prompt on stdin is not valid UTF-8 (byte {error.start}).", param="prompt") from error
    return text.removesuffix("\n").removesuffix("\r")


def _sampling_params(**given: Any) -> SamplingParams:
    from brim.engine.sampling_params import SamplingParams

    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def _wants_chat(llm: LLM, *, raw: bool, system: str | None) -> bool:
    has_template = bool(llm.info.get("has_chat_template"))
    if system is not None and (raw or not has_template):
        reason = "--raw sends none" if raw else "this model has none; give one with --chat-template"
        raise ConfigError(f"--system needs a chat template: {reason}.")
    return has_template and not raw


def _messages(text: str, system: str | None) -> list[dict[str, str]]:
    start = [{"role": "system", "content": system}] if system is not None else []
    return [*start, {"role": "user", "content": text}]


def _answer(
    llm: LLM, prompt: str | list[dict[str, str]], params: SamplingParams, *, as_json: bool, stream: bool, verbose: bool
) -> None:
    started = time.perf_counter()
    if as_json or not stream:
        output = llm.chat(prompt, params) if isinstance(prompt, list) else llm.generate([prompt], params)[0]
        completion = output.outputs[0]
        seconds = time.perf_counter() - started
        num_tokens = len(completion.token_ids)
        if as_json:
            print(json.dumps(_as_object(llm, output, seconds), ensure_ascii=False))
        else:
            write_text(completion.text)
            end_line()
        first_s = None
    else:
        num_tokens, first_s = stream_answer(llm, prompt, params, [])
        end_line()
        seconds = time.perf_counter() - started
    if verbose or sys.stderr.isatty():
        print(_summary(num_tokens, seconds, first_s), file=sys.stderr)


def stream_answer(
    llm: LLM, prompt: str | list[dict[str, str]], params: SamplingParams, parts: list[str]
) -> tuple[int, float | None]:
    """Write the completion to stdout as it comes, and its parts to `parts`. Returns (tokens, seconds to the first chunk)."""
    started = time.perf_counter()
    first_s: float | None = None
    num_tokens = 0
    for chunk in llm.stream(prompt, params):
        first_s = first_s if first_s is not None else time.perf_counter() - started
        num_tokens += len(chunk.token_ids)
        parts.append(chunk.text)
        write_text(chunk.text)
    return num_tokens, first_s


def write_text(text: str) -> None:
    """Write `text` to stdout as UTF-8 whatever the locale says, and let it be seen now."""
    if text:
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode("utf-8", "replace"))
        sys.stdout.buffer.flush()


def end_line() -> None:
    """A newline where a person reads; nothing where a program does."""
    if sys.stdout.isatty():
        write_text("\n")


def _as_object(llm: LLM, output: Any, seconds: float) -> dict[str, Any]:
    completion = output.outputs[0]
    return {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "token_ids": list(completion.token_ids),
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": len(completion.token_ids),
        "seconds": round(seconds, 4),
        "ready_s": llm.info.get("ready_s"),
    }


def _summary(num_tokens: int, seconds: float, first_s: float | None) -> str:
    first = f", the first after {first_s:.2f} s" if first_s is not None else ""
    return f"{num_tokens} tokens in {seconds:.2f} s ({num_tokens / max(seconds, 1e-9):.1f} tokens/s){first}"
