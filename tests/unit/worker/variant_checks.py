"""What only holds without Triton's interpreter, which the tests' process uses: `python -m tests.unit.worker.variant_checks NAME`.

No GPU is needed: launches are listed, or compiled for a target and given to a driver that runs nothing.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from brim.config.model_source import open_model
from brim.config.model_spec import ModelSpec, spec_from_hf_config
from brim.config.resolve import resolve
from brim.engine.sampling_params import SamplingParams
from brim.kernels.triton.chip import Chip
from brim.kernels.triton.choice import CHOSEN, KernelChoice
from brim.kernels.triton.kernels import TritonKernels
from brim.kernels.triton.rehearsal import TritonRehearsal
from brim.kernels.triton.scratch import KernelLimits
from brim.kernels.triton.variant import Variant, VariantList
from brim.memory.kv_layout import KVLayout
from brim.memory.step_memory import StepLimits
from brim.platforms.cpu import CpuPlatform
from brim.worker.device_worker import DeviceWorker
from brim.worker.sampler import SampleRows, SpecialRow
from brim.worker.startup import start_worker
from brim.worker.step_inputs import StepArrays
from brim.worker.variants import RehearsedModel, VariantStep, rehearse

TARGET = GPUTarget("cuda", 90, 32)
CHIP = Chip(num_cores=132, wide_products=False)
COMMON = {
    "vocab_size": 5003, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "torch_dtype": "bfloat16", "eos_token_id": 1,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**COMMON, "model_type": "llama"},
    "qwen3": {**COMMON, "model_type": "qwen3", "num_attention_heads": 6, "vocab_size": 4096},
    "qwen2": {**COMMON, "model_type": "qwen2", "num_attention_heads": 2, "torch_dtype": "float32"},
    "wide heads": {**COMMON, "model_type": "llama", "head_dim": 128, "num_attention_heads": 4},
    "gemma3": {
        **COMMON, "model_type": "gemma3_text", "sliding_window": 32, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16,
        "num_key_value_heads": 1,
    },
}  # fmt: skip
LENGTH, SEQS, TOKENS = 200, 20, 160
# The most variants of a kernel, for each attention window; 1 where nothing is said.
MOST = {"begin_decodes_kernel": 2, "prefill_attention_kernel": 3, "chunk_attention_kernel": 3, "rope_and_cache_kernel": 2,
        "pick_kernel": 2, "count_ids_kernel": 2, "matmul_kernel": 2, "gather_kernel": 3, "skinny_product_kernel": 5,
        "vector_product_kernel": 5, "hopper_product_kernel": 8}  # fmt: skip
CHOICES = (CHOSEN, KernelChoice(dependent_launch=True), KernelChoice(dependent_launch=True, fused_row=True),
           KernelChoice(hopper=True), replace(CHOSEN, split_norm=False))  # fmt: skip


def kernel_limits(spec: ModelSpec, num_seqs: int) -> KernelLimits:
    return KernelLimits(num_seqs, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size)


def rehearsed(
    spec: ModelSpec, limits: StepLimits, dtype: torch.dtype, chip: Chip = CHIP, choice: KernelChoice = CHOSEN
) -> tuple[TritonRehearsal, tuple[VariantStep, ...]]:
    rehearsal = TritonRehearsal(
        TARGET, lambda d, launch: TritonKernels(d, kernel_limits(spec, limits.max_num_seqs), chip, launch, choice)
    )
    steps = rehearse(rehearsal, spec, limits, KVLayout.of(spec, 16, dtype.itemsize), dtype)
    assert 0 < len(steps) < 20
    windows = len(set(spec.layer_kinds))
    for kernel, count in Counter(variant.kernel for variant in rehearsal.variants).items():
        most = MOST.get(kernel, 1) * (windows if "attention" in kernel else 1)
        assert count <= most, f"{count} variants of {kernel}"
    return rehearsal, steps


def started(family: str, folder: Path, listed: VariantList, **flags: Any) -> DeviceWorker:
    """A worker whose kernels only list their launches, on tensors with real addresses."""
    (folder / "config.json").write_text(json.dumps(CONFIGS[family]))
    limits = {"max_model_len": LENGTH, "max_num_seqs": SEQS, "max_num_batched_tokens": TOKENS}
    stored = CONFIGS[family]["torch_dtype"]
    config = resolve({"model": str(folder), "load_format": "dummy", "dtype": stored, **limits, **flags})
    source = open_model(config.model)
    return start_worker(
        config,
        CpuPlatform(),
        lambda num_seqs: TritonKernels("cpu", kernel_limits(source.spec, num_seqs), CHIP, listed),
        source,
        lambda progress: None,
    )


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], bool, int]:
    """Query lengths, start positions, sampled sequences, whether all are greedy, and which features special rows have."""
    lens = [1] * draw(st.integers(0, SEQS - 4)) + draw(
        st.lists(st.one_of(st.just(1), st.integers(1, 9), st.integers(1, TOKENS)), min_size=1, max_size=4)
    )
    while sum(lens) > TOKENS:
        lens.pop() if len(lens) > 1 else lens.__setitem__(0, TOKENS)
    starts = [draw(st.integers(0, LENGTH - length)) for length in lens]
    sampled = draw(st.lists(st.integers(0, len(lens) - 1), unique=True, min_size=1).map(sorted))
    return lens, starts, sampled, draw(st.booleans()), draw(st.integers(0, 7))


def step_of(
    batch: tuple[list[int], list[int], list[int], bool, int], num_blocks: tuple[int, ...]
) -> tuple[StepArrays, SampleRows]:
    lens, starts, sampled, all_greedy, features = batch
    width, rows = -(-LENGTH // 16), len(sampled)
    tables = tuple(np.arange(len(lens) * width, dtype=np.int32).reshape(len(lens), width) % count for count in num_blocks)
    arrays = StepArrays(
        token_ids=np.arange(sum(lens), dtype=np.int64),
        query_lens=np.array(lens, dtype=np.int32),
        start_positions=np.array(starts, dtype=np.int32),
        block_tables=tables,
        sample_indices=np.array(sampled, dtype=np.int32),
    )
    params = SamplingParams(
        temperature=0.0 if all_greedy else 0.7,
        repetition_penalty=1.2 if features & 1 else 1.0,
        presence_penalty=0.5 if features & 2 else 0.0,
        logprobs=(0, 1, 16, 20)[features & 3] if features & 4 else None,
    )
    history = np.arange(1 + features + len(lens), dtype=np.int64)
    special = tuple(SpecialRow(i, params, history[: 1 + i], history, ()) for i in range(rows) if features and i % 2 == 0)
    settings = SampleRows(
        temperature=np.full(rows, params.temperature, dtype=np.float32),
        top_k=np.full(rows, 5, dtype=np.int32),
        top_p=np.full(rows, 0.9, dtype=np.float32),
        min_p=np.zeros(rows, dtype=np.float32),
        seed=np.arange(rows, dtype=np.int64),
        position=np.zeros(rows, dtype=np.int64),
        special=special,
    )
    return arrays, settings


def check_steps(family: str) -> None:
    """Whatever step the worker runs, start-up included, and however it samples: its variants are among those rehearsed."""
    listed = VariantList(TARGET)
    with tempfile.TemporaryDirectory() as folder:
        worker = started(family, Path(folder), listed, memory="enough")
        runner, opened = worker.ready.warm.runner, worker.ready.warm.reserved.loaded.opened
        spec, limits = opened.settings.spec, opened.settings.limits
        rehearsal, steps = rehearsed(spec, limits, opened.settings.dtype)
        known = rehearsal.variants
        assert listed.variants <= known, lacking(listed.variants - known)
        listed.variants.clear()
        runs = 0

        @settings(max_examples=int(os.environ.get("VARIANT_EXAMPLES", "60")), deadline=None, database=None,
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(batches())
        def any_step(batch: tuple[list[int], list[int], list[int], bool, int]) -> None:
            nonlocal runs
            runs += 1
            arrays, rows = step_of(batch, worker.committed_blocks)
            runner.probe(arrays, rows)
            runner.forward(arrays)  # its last layer for the sampled rows alone
            assert listed.variants <= known, (batch, lacking(listed.variants - known))

        any_step()
        assert runs > 20
        for step in steps:  # so many are needed, too
            starts, everything = [0] * len(step.query_lens), list(range(len(step.query_lens)))
            batch = (list(step.query_lens), starts, everything, step.all_greedy, 7 * step.has_features)
            runner.probe(*step_of(batch, worker.committed_blocks))
        never = {variant.kernel for variant in known - listed.variants}
        ends = {"resolve_ids_kernel", "remember_ids_kernel", "begin_decodes_kernel", "end_decodes_kernel"}
        assert never <= ends, never  # this worker's tokens come from the host
        worker.close()


def lacking(variants: set[Variant] | frozenset[Variant]) -> list[Any]:
    return [json.loads(variant.text) for variant in variants]


@settings(max_examples=60, deadline=None, database=None)
@given(
    st.sampled_from(sorted(CONFIGS)), st.integers(1, 600), st.integers(0, 9000), st.integers(1, 9000), st.data(), st.booleans(),
    st.sampled_from(CHOICES),
)  # fmt: skip
def check_shapes(
    family: str, seqs: int, more_tokens: int, length: int, data: st.DataObject, wide: bool, choice: KernelChoice
) -> None:
    """Padded and captured shapes too: any (T, S, bound on the queries) that limits allow needs what was rehearsed."""
    spec = spec_from_hf_config(CONFIGS[family])
    limits = StepLimits(seqs, seqs + more_tokens, length)
    chip = Chip(132, wide, dependent_launch=True, hopper=True)
    dtype = torch.bfloat16
    rehearsal, _ = rehearsed(spec, limits, dtype, chip, choice)
    layout = KVLayout.of(spec, 16, dtype.itemsize)
    known = rehearsal.variants
    model = RehearsedModel(rehearsal.kernels, spec, limits, layout, dtype, rehearsal.device)
    for _ in range(8):
        num_seqs = data.draw(st.integers(1, seqs))
        bound = data.draw(st.one_of(st.just(1), st.integers(1, limits.max_num_tokens)))
        num_tokens = num_seqs if bound == 1 else data.draw(st.integers(max(num_seqs, bound), limits.max_num_tokens))
        model.run_shape(num_tokens, num_seqs, bound, all_greedy=data.draw(st.booleans()), has_features=False)
        assert rehearsal.variants == known, (limits, num_tokens, num_seqs, bound, lacking(rehearsal.variants - known))


class InertLauncher:
    """What calls a kernel, and does not."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        pass


class InertDriver:
    """A driver of a device that is not there."""

    launcher_cls = InertLauncher

    @property
    def utils(self) -> InertDriver:
        return self

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return object(), 0, 32, 0, 1024


def check_cache(family: str) -> None:
    """What other processes compiled is what a launch looks for: running every step through Triton itself compiles nothing more.

    TRITON_CACHE_DIR names an empty folder.
    """
    spec = spec_from_hf_config({**CONFIGS[family], "head_dim": 32})
    limits = StepLimits(SEQS, TOKENS, LENGTH)
    dtype = torch.bfloat16
    rehearsal, steps = rehearsed(spec, limits, dtype)
    report = rehearsal.compile().wait()
    assert report.num_variants == len(rehearsal.variants) and report.num_cached == 0
    assert all("libcuda" in failure for failure in report.failures), report  # not here: what calls kernels links against it
    assert all(variant.is_cached(TARGET) for variant in rehearsal.variants)
    hits: list[bool] = []
    knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    driver.set_active(InertDriver())
    kernels = TritonKernels("meta", kernel_limits(spec, SEQS), CHIP)
    model = RehearsedModel(kernels, spec, limits, KVLayout.of(spec, 16, dtype.itemsize), dtype, kernels.device)
    for step in steps:
        model.run(step)
    assert len(hits) == len(rehearsal.variants) and all(hits), (len(hits), hits)
    assert rehearsal.compile().wait().num_cached == len(rehearsal.variants)


CHECKS: dict[str, Callable[..., None]] = {"steps": check_steps, "shapes": check_shapes, "cache": check_cache}

if __name__ == "__main__":
    CHECKS[sys.argv[1]](*sys.argv[2:])
