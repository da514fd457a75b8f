"""A model whose tokens are letters, over the fake executor: enough to test everything above a device. Torch-free."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from brim.config.schema import BrimConfig
from brim.engine.block_manager import BlockManager
from brim.engine.core import EngineCore
from brim.engine.fake_executor import FakeExecutor
from brim.engine.limits import EngineLimits
from brim.engine.messages import StartupProgress
from brim.engine.sampling_params import SamplingParams
from brim.engine.scheduler import Scheduler
from brim.engine.sequence_table import SequenceTable
from brim.engine.step import StepPlan, StepResult
from brim.errors import InvalidParameter, MemoryBudgetError
from brim.memory.kv_layout import KVGroup, KVLayout

ALPHABET = " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,é!"
BOS, EOS, FIRST = 0, 1, 2
VOCAB_SIZE = FIRST + len(ALPHABET)
MAX_MODEL_LEN = 128
FATAL_LETTER = "!"  # a step over a prompt that ends in it fails


class LetterTokenizer:
    """One letter a token; BOS in front."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = [FIRST + max(0, ALPHABET.find(letter)) for letter in text]
        return [BOS, *ids] if add_special_tokens else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(self.id_to_piece(i) or "" for i in ids if i >= FIRST or not skip_special_tokens)

    def id_to_piece(self, token_id: int) -> str | None:
        if token_id < FIRST:
            return ("<bos>", "<eos>")[token_id]
        return ALPHABET[token_id - FIRST] if token_id < VOCAB_SIZE else None

    def token_bytes(self, token_id: int) -> bytes:
        return self.decode([token_id]).encode()


class LetterTools:
    """TextTools over it."""

    def __init__(self) -> None:
        self._tokenizer = LetterTokenizer()

    def new_detokenizer(self, params: SamplingParams, /) -> LetterDetokenizer:
        return LetterDetokenizer(params.skip_special_tokens)

    def new_stop_scanner(self, params: SamplingParams, /) -> LetterStops:
        return LetterStops(params)

    def token_text(self, token_id: int, /) -> str:
        return self._tokenizer.id_to_piece(token_id) or ""


class LetterDetokenizer:
    def __init__(self, skips_special: bool) -> None:
        self._skips_special = skips_special

    def feed(self, ids: Sequence[int], /) -> str:
        return LetterTokenizer().decode(ids, self._skips_special)

    def finish(self) -> str:
        return ""


class LetterStops:
    """Holds back as many letters as the longest stop string may need."""

    def __init__(self, params: SamplingParams) -> None:
        self._stop, self._include = params.stop, params.include_stop_str_in_output
        self._held = ""

    def feed(self, text: str, /) -> tuple[str, str | None]:
        self._held += text
        for stop in self._stop:
            at = self._held.find(stop)
            if at >= 0:
                return self._held[: at + len(stop) * self._include], stop
        keep = max(map(len, self._stop)) - 1
        shown, self._held = self._held[: max(0, len(self._held) - keep)], self._held[max(0, len(self._held) - keep) :]
        return shown, None

    def finish(self) -> str:
        return self._held


@dataclass(frozen=True)
class LetterFront:
    """ServerFront."""

    tokenizer: LetterTokenizer = field(default_factory=LetterTokenizer)
    chat_template: object | None = "each message on its own"
    text_tools: LetterTools = field(default_factory=LetterTools)
    model_names: tuple[str, ...] = ("letters", "alias")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, extra: Mapping[str, Any] | None = None
    ) -> list[int]:
        if any(message["role"] == "rogue" for message in messages):
            raise InvalidParameter("The chat template refuses these messages: no rogues.", param="messages")
        text = "".join(f"{m['role']} {_text_of(m['content'])}." for m in messages)
        return self.encode(text + ("assistant " if add_generation_prompt else ""))


def _text_of(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


class LetterExecutor(FakeExecutor):
    """Takes `step_s` a step, fails for FATAL_LETTER, and has an account."""

    step_s = 0.0

    def execute(self, plan: StepPlan) -> StepResult:
        time.sleep(self.step_s)
        fatal = FIRST + ALPHABET.index(FATAL_LETTER)
        if any(seq.token_ids[seq.num_prompt_tokens - 1] == fatal for seq in plan.sequences):
            raise RuntimeError("a fatal letter")
        return super().execute(plan)

    def memory_report(self) -> dict[str, Any]:
        line = {"category": "kv_cache", "owner": "KV cache", "bytes": 4096, "known_by": "computed"}
        return {
            "cap_bytes": 8192,
            "total_bytes": 16384,
            "held_bytes": 4096,
            "resident_bytes": 4000,
            "peak_bytes": 4096,
            "free_bytes": 10000,
            "ledger": [line, line],
            "kv": {"max_model_len": MAX_MODEL_LEN},
            "phases": [],
        }


def build_letter_core(
    config: BrimConfig, on_progress: Callable[[StartupProgress], None], *, step_s: float = 0.0
) -> tuple[EngineCore, dict[str, Any]]:
    """Stands in for `runtime.build_engine_core`."""
    on_progress(StartupProgress("load", "reading letters", 1.0))
    if config.model.model == "huge":
        raise MemoryBudgetError("It does not fit.", nearest=["--max-model-len 8"])
    layout = KVLayout((KVGroup("full", (0,), 0, 64),), 4, 1, 1, 1)
    limits = EngineLimits(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=MAX_MODEL_LEN)
    table = SequenceTable(limits.max_num_seqs, limits.max_model_len, layout)
    executor = LetterExecutor(layout, [200], vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,))
    executor.step_s = step_s
    scheduler = Scheduler(limits, BlockManager(layout, [200], table, enable_prefix_caching=True), table)
    core = EngineCore(scheduler, executor, vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,))
    return core, {"model": config.model.model, "max_model_len": MAX_MODEL_LEN, "vocab_size": VOCAB_SIZE}
