"""The process of one measured engine: open it, say when it was ready, do the parts it was given, watch its memory. Not a verb.

Owns the lines it writes on stdout, one JSON object each: ready, token, part, memory, failed. A part that fails is a line too,
and the next one goes on. What it is doing is said on stderr.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from brim.cli import measure
from brim.cli.engine import open_llm
from brim.cli.workloads import workload_named
from brim.engine.sampling_params import SamplingParams
from brim.errors import BrimError

if TYPE_CHECKING:
    from brim.llm import LLM

_SAMPLE_S = 0.2


def main() -> int:
    """argv[1]: a JSON object with model, settings and parts, a list of {part, and the arguments of its method}."""
    task = json.loads(sys.argv[1])
    try:
        with open_llm(task["model"], task["settings"], quiet=True) as llm:
            _tell("ready", at=time.monotonic())
            with MemoryWatch(llm) as watch:
                llm.generate([[1, 2, 3, 4]], SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))
                _tell("token", at=time.monotonic(), info=llm.info)
                for part in task["parts"]:
                    _do(llm, dict(part))
            _tell("memory", **watch.summary(), kv=llm.memory()["kv"])
    except BrimError as error:
        _tell("failed", message=str(error))
        return 1
    _tell("ended", peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return 0


def _do(llm: LLM, part: dict[str, Any]) -> None:
    name, started = part.pop("part"), time.monotonic()
    try:
        result = _PARTS[name](llm, **part)
    except BrimError as error:
        result = {"failed": str(error)}
    _tell("part", name=name, result=result, seconds=round(time.monotonic() - started, 3))


def _decode(llm: LLM, batch_sizes: list[int], **lengths: int) -> dict[str, Any]:
    found = {str(size): measure.measure_decode(llm, batch_size=size, say=_say, **lengths) for size in batch_sizes}
    return {"ms_per_token": found, **lengths}


def _prefill(llm: LLM, **lengths: int) -> dict[str, Any]:
    return {"ms": measure.measure_prefill(llm, say=_say, **lengths), **lengths}


def _workload(llm: LLM, name: str, num_seqs: int) -> dict[str, Any]:
    workload = workload_named(name, llm.info["vocab_size"], num_seqs)
    _say(f"workload {workload.name}: {len(workload.prompts)} requests, {workload.num_output_tokens:,} new tokens")
    tokens_per_s, seconds = measure.measure_throughput(llm, workload)
    return {"tokens_per_s": tokens_per_s, "seconds": seconds, "name": workload.name, "num_seqs": num_seqs,
            "prompt_tokens": workload.num_prompt_tokens, "output_tokens": workload.num_output_tokens}  # fmt: skip


def _long(llm: LLM, batch_size: int, input_len: int, output_len: int) -> dict[str, Any]:
    fits = measure.fitting_input_len(llm, batch_size, input_len, output_len)
    _say(f"long context: {batch_size} sequences of {fits:,} tokens")
    ms = measure.measure_steady_decode(llm, batch_size=batch_size, input_len=fits, output_len=output_len)
    return {"ms_per_token": ms, "batch_size": batch_size, "input_len": fits, "asked_input_len": input_len,
            "output_len": output_len}  # fmt: skip


def _beside(llm: LLM, batch_size: int, input_len: int, output_len: int) -> dict[str, Any]:
    _say(f"a prompt of {input_len:,} tokens beside {batch_size} that decode")
    return measure.measure_beside(llm, batch_size=batch_size, input_len=input_len, output_len=output_len)


_PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "decode": _decode, "prefill": _prefill, "workload": _workload, "long": _long, "beside": _beside,
}  # fmt: skip


class MemoryWatch:
    """Samples, between enter and exit, of what is free on the device and what the engine holds."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._samples: list[tuple[int, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="brim-bench-memory", daemon=True)

    def _run(self) -> None:
        self._sample()
        while not self._stop.wait(_SAMPLE_S):
            self._sample()
        self._sample()

    def _sample(self) -> None:
        report = self._llm.memory()
        self._samples.append((int(report["free_bytes"]), int(report["resident_bytes"])))

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def summary(self) -> dict[str, Any]:
        """First, least and most bytes of both, and how many samples."""
        return measure.moves_of(self._samples)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _tell(event: str, **values: Any) -> None:
    print(json.dumps({"event": event, **values}, default=str), flush=True)


if __name__ == "__main__":
    sys.exit(main())
