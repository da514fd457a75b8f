"""What the host does in a step, without a device: microseconds a step and a sequence, part by part, on workload W.

    python benchmarks/host_step.py [--num-seqs 256] [--repeats 3] [--profile] [--json FILE]

core: scheduler, blocks, step plans and their settling, over an executor that answers at once. output: the caller's half (chunks,
usage, collecting). inputs: filling the input and sampling buffers of the worker and handing them on, in host memory. wire:
msgpack of a step's outputs, both ways, as between the server's process and the engine's.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import platform
import pstats
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import torch

from brim.cli.workloads import Workload, workload_w
from brim.engine.block_manager import BlockManager
from brim.engine.completion import CompletionCollector
from brim.engine.core import EngineCore
from brim.engine.limits import EngineLimits
from brim.engine.messages import FromEngine, SequenceOutput, StepOutputs
from brim.engine.output_processor import OutputProcessor
from brim.engine.sampling_params import SamplingParams
from brim.engine.scheduler import Scheduler
from brim.engine.sequence_table import SequenceTable
from brim.engine.step import BlockCopy, Executor, StepPlan, StepResult
from brim.front import IdsOnlyTools
from brim.kernels.torch_ref import TorchKernels
from brim.memory.kv_layout import KVGroup, KVLayout
from brim.memory.step_memory import StepLimits
from brim.worker.runner import ModelRunner
from brim.worker.sampler import Sampler
from brim.worker.step_inputs import StepInputs
from brim.worker.step_sizes import rounded_sizes

VOCAB = 151_936
LIMITS = StepLimits(max_num_seqs=256, max_num_tokens=8192, max_model_len=8192)
LAYOUT = KVLayout((KVGroup("full", tuple(range(28)), 0, 28 * 2 * 16 * 8 * 128 * 2),), 16, 8, 128, 2)


class InstantExecutor(Executor):
    """Answers at once, with ids that stop nothing; `runner` fills the worker's buffers before, where one is given."""

    def __init__(self, runner: ModelRunner | None) -> None:
        self._runner = runner
        self._ids = np.arange(5, 5 + LIMITS.max_num_seqs)
        self.inputs_s = 0.0

    def submit(self, plan: StepPlan) -> Callable[[], StepResult]:
        """See Executor."""
        if self._runner is None:
            return super().submit(plan)
        started = time.perf_counter()
        wait = self._runner.submit(plan)
        self.inputs_s += time.perf_counter() - started

        def result() -> StepResult:
            started = time.perf_counter()
            wait()
            self.inputs_s += time.perf_counter() - started
            return self.execute(plan)

        return result

    def execute(self, plan: StepPlan) -> StepResult:
        """See Executor."""
        return StepResult(plan.step_id, self._ids[: len(plan.sample_indices)])

    def copy_blocks(self, copies: Iterable[BlockCopy]) -> None:
        """None come."""

    def set_committed_blocks(self, blocks: tuple[int, ...]) -> tuple[int, ...]:
        """As asked."""
        return blocks

    def pressure_bytes(self) -> int:
        """None."""
        return 0

    def close(self) -> None:
        """Nothing is held."""


class NoModel:
    """Where the device would work, nothing happens."""

    spec = SimpleNamespace(vocab_size=VOCAB, hidden_size=64)
    dtype = torch.float32
    segments = ()

    def forward(self, step: Any) -> torch.Tensor:
        """Hidden states of nothing."""
        return step.buffers["hidden"][: step.ids.shape[0]]

    def logits(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """None."""


class NoKernels(TorchKernels):
    """Sampling and gathering left out."""

    def sample(self, *args: Any) -> None:
        """Nothing."""

    def gather_rows(self, *args: Any) -> None:
        """Nothing."""


def new_runner() -> ModelRunner:
    """A runner as on a device with two steps in flight, in host memory, whose graphs do nothing."""
    kernels, model, device = NoKernels("cpu"), NoModel(), torch.device("cpu")
    sizes = rounded_sizes(LIMITS, LIMITS.max_num_seqs)
    logits = torch.zeros(LIMITS.max_num_seqs, 8)
    mark = lambda: SimpleNamespace(wait=lambda: None)  # noqa: E731
    sampler = Sampler(kernels, model, LIMITS, logits, sizes.rows, mark, 2)  # type: ignore[arg-type]
    inputs = StepInputs(LIMITS, LAYOUT, device, 2)
    cache = SimpleNamespace(layer_views=[])
    buffers = {"hidden": torch.zeros(LIMITS.max_num_tokens, 64)}
    runner = ModelRunner(model, cache, inputs, sampler, buffers, sizes, kernels, True)  # type: ignore[arg-type]

    @contextmanager
    def capture() -> Any:
        yield SimpleNamespace(replay=lambda: None)

    choice = SimpleNamespace(decode_whole=True, mixed_whole=False, pieces=False)
    list(runner.record(capture, choice, (False, True)))  # type: ignore[arg-type]
    return runner


def new_core(executor: Executor) -> EngineCore:
    """As `runtime.core_over` makes it for an accelerator."""
    limits = EngineLimits(
        max_num_seqs=LIMITS.max_num_seqs,
        max_num_batched_tokens=LIMITS.max_num_tokens,
        max_model_len=LIMITS.max_model_len,
        pipeline_depth=2,
    )
    table = SequenceTable(limits.max_num_seqs, limits.max_model_len, LAYOUT)
    blocks = BlockManager(LAYOUT, (40_000,), table)
    return EngineCore(Scheduler(limits, blocks, table), executor, vocab_size=VOCAB, eos_token_ids=(2,))


def run_workload(workload: Workload, parts: dict[str, float], *, with_runner: bool, profile: cProfile.Profile | None) -> int:
    """Serve the workload once as `LLM.generate` does; seconds are added to `parts`. How many steps it took."""
    executor = InstantExecutor(new_runner() if with_runner else None)
    core, processor = new_core(executor), OutputProcessor(IdsOnlyTools())
    encode, decode = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(FromEngine).decode
    collectors, clock, num_steps = {}, time.perf_counter, 0
    for index, (prompt, count) in enumerate(zip(workload.prompts, workload.num_new_tokens, strict=True)):
        params = SamplingParams(temperature=workload.temperature, max_tokens=count, ignore_eos=True)
        for message in processor.add(f"llm-{index}", prompt, params, arrival_s=0.0):
            core.add(message)
        collectors[f"llm-{index}"] = CompletionCollector(f"llm-{index}")
    if profile is not None:
        profile.enable()
    while core.has_work:
        before = clock()
        outputs = core.step()
        stepped = clock()
        chunks = processor.process(outputs).chunks
        for chunk in chunks:
            collectors[chunk.request_id].add(chunk)
        processed = clock()
        _over_the_wire(outputs, encode, decode)
        parts["wire"] += clock() - processed
        parts["output"] += processed - stepped
        parts["core"] += stepped - before
        num_steps += 1
    if profile is not None:
        profile.disable()
    parts["inputs"] += executor.inputs_s
    parts["core"] -= executor.inputs_s
    return num_steps


def _over_the_wire(outputs: list[SequenceOutput], encode: Any, decode: Any) -> None:
    decode(encode(StepOutputs(outputs)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-seqs", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="say which functions take the time (and slow everything down)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)  # copies in host memory stand for queued ones
    workload = workload_w(VOCAB, args.num_seqs)
    profile = cProfile.Profile() if args.profile else None
    best: dict[str, float] = {}
    for _ in range(args.repeats):
        parts = dict.fromkeys(("core", "inputs", "output", "wire"), 0.0)
        num_steps = run_workload(workload, parts, with_runner=True, profile=profile)
        best = {name: min(seconds, best.get(name, seconds)) for name, seconds in parts.items()}
    tokens = workload.num_output_tokens
    print(f"{args.num_seqs} sequences, {tokens} tokens, {num_steps} steps; best of {args.repeats}")
    print(f"{'part':8} {'s in all':>9} {'us a step':>10} {'us a token':>11}")
    for name, seconds in {**best, "offline": best["core"] + best["inputs"] + best["output"]}.items():
        print(f"{name:8} {seconds:9.3f} {seconds / num_steps * 1e6:10.0f} {seconds / tokens * 1e6:11.3f}")
    if profile is not None:
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    if args.json:
        record = {
            "command": " ".join(["python", "benchmarks/host_step.py", *sys.argv[1:]]),
            "versions": {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__},
            "num_seqs": args.num_seqs, "num_tokens": tokens, "num_steps": num_steps, "seconds": best,
        }  # fmt: skip
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
