"""The conversation `brim run` holds when it was given no prompt. Owns the reading of a person's lines and the commands.

/bye leaves, /clear forgets what was said, ``` opens and closes a block of several lines. Ctrl-C stops an answer; Ctrl-D leaves.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from brim.errors import RequestError, RequestFailed

if TYPE_CHECKING:
    from brim.engine.sampling_params import SamplingParams
    from brim.llm import LLM

_FENCE = "```"
_COMMANDS = "/bye leaves, /clear forgets what was said, ``` opens and closes a block of several lines."


def hold_conversation(llm: LLM, params: SamplingParams, *, system: str | None, is_chat: bool) -> None:
    """Read, answer, repeat, until /bye or the end of input. A base model continues each entry as text and keeps nothing."""
    from brim.cli.run import end_line, stream_answer

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() a history)
    kind = "Chat" if is_chat else "This model continues text (it has no chat template)"
    print(f"{kind}. {_COMMANDS}", file=sys.stderr)
    start = [{"role": "system", "content": system}] if system is not None else []
    messages = list(start)
    while (entry := read_entry()) is not None:
        if entry == "/clear":
            messages = list(start)
        elif entry.startswith("/") and "\n" not in entry and is_chat and " " not in entry:
            print(f"Unknown command {entry}. {_COMMANDS}", file=sys.stderr)
        elif entry.strip():
            parts: list[str] = []
            question = {"role": "user", "content": entry}
            try:
                stream_answer(llm, [*messages, question] if is_chat else entry, params, parts)
            except KeyboardInterrupt:
                print(" (stopped)", file=sys.stderr)
            except (RequestError, RequestFailed) as error:
                print(f"brim: {error}", file=sys.stderr)
                continue
            end_line()
            messages += [question, {"role": "assistant", "content": "".join(parts)}]


def read_entry() -> str | None:
    """One entry: a line, or the lines between two ```. None at /bye or the end of input."""
    lines: list[str] = []
    in_block = False
    while True:
        try:
            line = _read_line("... " if in_block else ">>> ")
        except EOFError:
            return "\n".join(lines) if lines else None
        except KeyboardInterrupt:
            print("\n(/bye or Ctrl-D leaves)", file=sys.stderr)
            lines, in_block = [], False
            continue
        if not in_block and line.strip() == "/bye":
            return None
        if not in_block and not line.startswith(_FENCE):
            return line
        text = line if in_block else line.removeprefix(_FENCE)
        ends = text.rstrip().endswith(_FENCE)
        if ends:
            text = text.rstrip().removesuffix(_FENCE)
        if text or (in_block and not ends):  # nothing beside a fence is no line; an empty line within is
            lines.append(text)
        in_block = True
        if ends:
            return "\n".join(lines)


def _read_line(prompt: str) -> str:
    if sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)
    return input()
