"""Whole decode steps and prefills under several choices of kernels, for `cuda_tuning.py`. Owns the model and its cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from cuda_timing import ModelShape
from torch import Tensor
from tuning_cases import BYTES_PER_S, CHIP, OPERATIONS_PER_S, Candidate, Case

from brim.config.model_spec import ModelSpec, spec_from_hf_config
from brim.kernels.base import AttentionBatch, SamplingBatch
from brim.kernels.triton.choice import CHOSEN, KernelChoice
from brim.kernels.triton.kernels import TritonKernels
from brim.kernels.triton.launch import Launch
from brim.kernels.triton.scratch import KernelLimits
from brim.kernels.triton.tuning import FEW_ROWS
from brim.models.base import StepTensors
from brim.models.decoder import DecoderModel

CHOICES = {
    "today": KernelChoice(),
    "early": KernelChoice(dependent_launch=True),
    "fused early": KernelChoice(dependent_launch=True, fused_row=True),
    "hopper early": replace(CHOSEN, split_norm=False),
    "split norm early": CHOSEN,
}
LOADS = ((1, 264), (4, 264), (8, 264), (16, 264), (64, 264))
BLOCK = 16


def spec_of(name: str, shape: ModelShape) -> ModelSpec:
    """The architecture of a recorded model."""
    kind = "qwen3" if name.startswith("qwen3") else "llama"
    return spec_from_hf_config(
        {
            "model_type": kind, "vocab_size": shape.vocab, "hidden_size": shape.hidden, "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim, "max_position_embeddings": 16384, "torch_dtype": "bfloat16", "eos_token_id": 1,
            "tie_word_embeddings": kind == "qwen3", "rms_norm_eps": 1e-6,
        }
    )  # fmt: skip


@dataclass
class StepModel:
    """A model with random weights, a cache for `tokens` tokens and the buffers of a step of `rows` tokens."""

    model: DecoderModel
    caches: list[Tensor]
    buffers: dict[str, Tensor]
    limits: KernelLimits
    logits: Tensor
    device: str

    @staticmethod
    def make(name: str, shape: ModelShape, device: str, *, rows: int, blocks: int, layers: int | None = None) -> StepModel:
        """layers: fewer than the model has, where only launches are listed."""
        spec = spec_of(name, shape)
        if layers is not None:
            spec = replace(spec, num_layers=layers, layer_kinds=spec.layer_kinds[:layers])
        limits = KernelLimits(256, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size)
        model = DecoderModel(spec, TritonKernels(device, limits, CHIP), torch.bfloat16, 16384, torch.device(device))
        for weights in model.weights.layers:
            for matrix in (weights.qkv, weights.output, weights.gate_up, weights.down):
                matrix.storage.normal_(0, 0.02)  # type: ignore[attr-defined]
            for norm in (weights.input_norm, weights.mlp_norm, weights.q_norm, weights.k_norm):
                _ = norm is None or norm.fill_(1.0)
        model.weights.final_norm.fill_(1.0)
        for matrix in (model.weights.embedding, model.weights.lm_head):
            matrix.storage.normal_(0, 0.02)  # type: ignore[attr-defined]
        size = (blocks, spec.num_layers, 2, BLOCK, spec.num_kv_heads, spec.head_dim)
        pool = torch.zeros(size, dtype=torch.bfloat16, device=device).normal_(0, 0.5)
        buffers = {s.name: torch.zeros(rows, s.width, dtype=s.dtype, device=device) for s in model.buffer_shapes()}
        logits = torch.zeros(256, spec.vocab_size, device=device)
        return StepModel(model, [pool[:, i] for i in range(spec.num_layers)], buffers, limits, logits, device)

    def with_choice(self, choice: KernelChoice, launch: Launch) -> tuple[DecoderModel, TritonKernels]:
        """The same weights under other kernels."""
        kernels = TritonKernels(self.device, self.limits, CHIP, launch, choice)
        twin = copy.copy(self.model)
        twin._kernels, twin._fused_rows = kernels, kernels.fused_rows(self.model.spec, self.model.dtype)
        twin._segments = tuple(twin._build_segments())
        return twin, kernels

    def step(self, query_len: int, seqs: int, length: int, choice: KernelChoice, launch: Launch) -> Callable[[], None]:
        """One greedy step of `seqs` sequences with so many new tokens each, that are `length` long after it."""
        model, kernels = self.with_choice(choice, launch)
        tokens, device, blocks = seqs * query_len, self.device, -(-length // BLOCK)
        tables = (torch.arange(seqs * blocks, dtype=torch.int32) % self.caches[0].shape[0]).view(seqs, blocks).to(device)
        starts = torch.arange(seqs + 1, dtype=torch.int32, device=device) * query_len
        lens = torch.full((seqs,), length, dtype=torch.int32, device=device)
        positions = torch.arange(length - query_len, length, device=device).repeat(seqs)
        slots = tables.long().gather(1, (positions.view(seqs, query_len) // BLOCK)).view(-1) * BLOCK + positions % BLOCK
        batch = AttentionBatch(tables, slots, starts, lens, seqs, query_len, length, BLOCK, 0)
        ids, last = torch.zeros(tokens, dtype=torch.int64, device=device), torch.zeros(257, dtype=torch.int64, device=device)
        rows, hidden_rows = torch.arange(seqs, device=device), torch.zeros(seqs, self.model.spec.hidden_size, device=device)
        hidden_rows, sampled = hidden_rows.bfloat16(), torch.zeros(seqs, dtype=torch.int64, device=device)
        last_rows = (starts[1:] - 1).long()
        floats = torch.zeros(seqs, device=device)
        params = SamplingBatch(floats, rows.int(), floats, floats, rows, rows, all_greedy=True)
        tensors = StepTensors(ids, positions, [batch], self.caches, self.buffers)

        def run() -> None:
            kernels.resolve_ids(ids[:seqs], rows, last)
            hidden = model.forward(tensors)
            kernels.gather_rows(hidden, last_rows, hidden_rows)
            model.logits(hidden_rows, self.logits[:seqs])
            kernels.sample(self.logits[:seqs], params, sampled)
            kernels.remember_ids(sampled, rows, last)

        return run


def step_cases(name: str, shape: ModelShape, device: str, launch: Launch) -> Iterator[Case]:
    """Decode steps under every choice, in one graph each; the results of the last layer beside those of today's kernels."""
    kv_bytes = 2 * shape.layers * shape.kv_heads * shape.head_dim * 2
    weights = sum(a * b for a, b in shape.linears().values()) * shape.layers + shape.vocab * shape.hidden
    blocks = min(256 * 63, int(30e9 // (kv_bytes * BLOCK)))
    made = StepModel.make(name, shape, device, rows=256, blocks=blocks, layers=1 if device == "meta" else None)
    for seqs, length in LOADS:
        case = Case(f"step {seqs}x{length}", (2 * weights + seqs * length * kv_bytes) / BYTES_PER_S * 1e3, worst_error=0.1)
        for label, choice in CHOICES.items():
            if seqs > (FEW_ROWS if choice.hopper else 1 if choice.fused_row else seqs):
                continue  # the same kernels
            if choice.split_norm and (seqs == 1 or made.model.spec.hidden_size > 2048):
                continue
            run = made.step(1, seqs, length, choice, launch)
            case.candidates.append(Candidate(label, [run], made.logits[:seqs], label == "today", choice))
        yield case


def prefill_step_cases(name: str, shape: ModelShape, device: str, launch: Launch, *, hopper: bool) -> Iterator[Case]:
    """A prompt of 8,000 tokens as one step, call by call in one graph."""
    made = StepModel.make(name, shape, device, rows=8000, blocks=512, layers=1 if device == "meta" else None)
    operations = 2.0 * 8000 * sum(a * b for a, b in shape.linears().values()) * shape.layers
    operations += 4.0 * shape.heads * shape.head_dim * 8000 * 8001 / 2 * shape.layers
    case = Case("prefill step of 8000", operations / OPERATIONS_PER_S * 1e3, worst_error=0.1)
    choices = {"today": KernelChoice(), "early": KernelChoice(dependent_launch=True)}
    if hopper:
        choices = {"today": KernelChoice(), "hopper": KernelChoice(hopper=True),
                   "hopper early": KernelChoice(dependent_launch=True, hopper=True)}  # fmt: skip
    for label, choice in choices.items():
        run = made.step(8000, 1, 8000, choice, launch)
        case.candidates.append(Candidate(label, [run], made.logits[:1], label == "today", choice))
    yield case
