"""One engine, measured in a process of its own: the child of `peers_cpu.py`.

Runs under the interpreter that has the engine installed, so it imports only the standard library and that engine. Every engine
is driven the same way: token ids in, greedy, end-of-sequence ignored, a fixed number of new tokens, all prompts at once.

    python benchmarks/peer_engines.py TASK.json      prints one JSON line
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

Prompts = list[list[int]]
SHORT_TOKENS = 16


class PeerEngine(ABC):
    """An engine that is ready when it exists. `task`: model (path), dtype, dummy (random weights), threads, context."""

    @abstractmethod
    def __init__(self, task: dict[str, Any]) -> None: ...

    @abstractmethod
    def generate(self, prompts: Prompts, num_new: int) -> None:
        """Compute num_new greedy tokens for each prompt."""

    @property
    @abstractmethod
    def version(self) -> str:
        """The engine's version."""


class Brim(PeerEngine):
    """This project, in process, at its defaults."""

    def __init__(self, task: dict[str, Any]) -> None:
        from brim import LLM

        self._llm = LLM(
            task["model"],
            tokenizer=task["tokenizer"],
            dtype=task["dtype"],
            load_format="dummy" if task["dummy"] else "auto",
            max_model_len=task["context"],
            memory="enough",
            enable_prefix_caching=False,
            num_threads=task["threads"],
        )

    def generate(self, prompts: Prompts, num_new: int) -> None:
        from brim import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=num_new, ignore_eos=True)
        outputs = self._llm.generate(prompts, params)
        assert all(len(output.outputs[0].token_ids) == num_new for output in outputs)

    @property
    def version(self) -> str:
        from importlib.metadata import version

        return version("brim")


class Transformers(PeerEngine):
    """Hugging Face transformers: `generate` on a left-padded batch."""

    def __init__(self, task: dict[str, Any]) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.set_num_threads(task["threads"])
        dtype = getattr(torch, task["dtype"])
        if task["dummy"]:
            torch.manual_seed(0)
            self._model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(task["model"]), dtype=dtype)
        else:
            self._model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=dtype)
        self._model.eval()

    def generate(self, prompts: Prompts, num_new: int) -> None:
        import torch

        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            out = self._model.generate(
                ids, attention_mask=mask, do_sample=False, min_new_tokens=num_new, max_new_tokens=num_new, pad_token_id=0
            )
        assert out.shape[1] == longest + num_new

    @property
    def version(self) -> str:
        import transformers

        return str(transformers.__version__)


class Vllm(PeerEngine):
    """vLLM's CPU build, engine in this process, on all cores."""

    def __init__(self, task: dict[str, Any]) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM

        self._llm = LLM(
            task["model"],
            dtype=task["dtype"],
            load_format="dummy" if task["dummy"] else "auto",
            max_model_len=task["context"],
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            max_num_seqs=16,
        )

    def generate(self, prompts: Prompts, num_new: int) -> None:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=num_new, min_tokens=num_new, ignore_eos=True, detokenize=False)
        outputs = self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == num_new for output in outputs)

    @property
    def version(self) -> str:
        import vllm

        return str(vllm.__version__)


class LlamaCpp(PeerEngine):
    """llama.cpp through its C API: prompts in batches, then one token a sequence and step."""

    def __init__(self, task: dict[str, Any]) -> None:
        import llama_cpp as api

        self._api = api
        self._log = api.llama_log_callback(lambda *_: None)
        api.llama_log_set(self._log, None)
        api.llama_backend_init()
        self._model = api.llama_model_load_from_file(task["model"].encode(), api.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {task['model']}")
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 8192, 2048, 512, 16
        params.n_threads = params.n_threads_batch = task["threads"]
        params.kv_unified = True
        self._context = api.llama_init_from_model(self._model, params)
        self._vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._batch_tokens = 2048
        self._batch = api.llama_batch_init(self._batch_tokens, 0, 1)

    def generate(self, prompts: Prompts, num_new: int) -> None:
        api = self._api
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        entries = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        last = [0] * len(prompts)
        for start in range(0, len(entries), self._batch_tokens):
            self._step(entries[start : start + self._batch_tokens], last)
        for done in range(num_new - 1):
            self._step([(last[s], len(prompt) + done, s, True) for s, prompt in enumerate(prompts)], last)

    def _step(self, entries: list[tuple[int, int, int, bool]], last: list[int]) -> None:
        """Decode (token, position, sequence, wants logits) entries; the greedy tokens go to `last` by sequence."""
        import numpy as np

        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wants_logits) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wants_logits
            batch.seq_id[i][0] = sequence
        if self._api.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        for i, (_, _, sequence, wants_logits) in enumerate(entries):
            if wants_logits:
                row = self._api.llama_get_logits_ith(self._context, i)
                last[sequence] = int(np.ctypeslib.as_array(row, shape=(self._vocab_size,)).argmax())

    @property
    def version(self) -> str:
        return f"llama-cpp-python {self._api.__version__}"


ENGINES: dict[str, type[PeerEngine]] = {
    "brim": Brim,
    "transformers": Transformers,
    "vllm-cpu": Vllm,
    "llama.cpp": LlamaCpp,
}


def measure(engine: PeerEngine, task: dict[str, Any]) -> dict[str, float]:
    """The columns of the CPU tables in ms and s. Decode is (time of 16 + N new tokens - time of 16) / N, same prompts.

    Each time is the best of its repetitions, for every engine alike: what others do on the machine only ever adds.
    """

    def seconds(prompts: Prompts, num_new: int) -> float:
        started = time.perf_counter()
        engine.generate(prompts, num_new)
        return time.perf_counter() - started

    def prefill_ms(prompts: list[Prompts]) -> float:
        return min(seconds(each, 1) for each in prompts) * 1000

    def decode_ms(prompts: Prompts) -> float:
        num_new, rounds = task["output_len"], range(task["decode_iters"])
        seconds(prompts, 2)
        short_s, long_s = zip(
            *[(seconds(prompts, SHORT_TOKENS), seconds(prompts, SHORT_TOKENS + num_new)) for _ in rounds], strict=True
        )
        return (min(long_s) - min(short_s)) / num_new * 1000

    one, eight = task["prompts_1"], task["prompts_8"]
    seconds(one[0], 1)
    result = {"prefill_128_ms": prefill_ms(one), "decode_b1_ms": decode_ms(one[0]), "prefill_8x128_ms": prefill_ms(eight)}
    result["decode_b8_ms"] = decode_ms(eight[0])
    if task["mixed"]:
        result["mixed_16_s"] = min(seconds(task["mixed"], task["mixed_new_tokens"]) for _ in range(2))
    return result


def peak_rss_mib() -> float:
    """The most this process held. Where /proc has it, from there: getrusage's figure starts at the parent's."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    """Print one JSON line: start_s, first_token_s, the measured columns, peak RSS and the version."""
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    engine = ENGINES[task["engine"]](task)
    ready_at = time.monotonic()
    engine.generate([task["prompts_1"][0][0][:8]], 1)
    token_at = time.monotonic()
    gc.collect()
    result: dict[str, Any] = {"start_s": ready_at - task["started_at"], "first_token_s": token_at - task["started_at"]}
    result |= measure(engine, task)
    result["peak_rss_mib"] = peak_rss_mib()
    result["version"] = engine.version
    print(json.dumps(result), flush=True)
    os._exit(0)  # some engines take long, or fail, to leave; what counts is printed


if __name__ == "__main__":
    sys.exit(main())
