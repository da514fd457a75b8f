"""The CPU backend: each kernel of the contract as one packed operation for the native library. Owns `CpuKernels`.

A call packs a descriptor (addresses, sizes, strides) and runs it on the pool, or, while recording, stores it in a `Program`.
The order of the fields is said beside each kernel in csrc. Kernels allocate nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from brim.kernels.base import Activation, AttentionBatch, Kernels, LinearWeight, SamplingBatch, StoredRows
from brim.kernels.cpu.native import NativeLibrary, ThreadPool, op_format
from brim.kernels.cpu.program import Program
from brim.kernels.cpu.quantized import BLOCK_TYPES, BlockWeight, JoinedWeight, block_num_bytes, merged, stored_num_bytes
from brim.kernels.cpu.storage import WeightStorage
from brim.kernels.cpu.weight import PackedWeight, packed_num_bytes

_DTYPE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_ACTIVATION = {"silu": 0, "gelu_tanh": 1}

# operation codes: the table in csrc/kernels.c
_LINEAR, _PACK, _EMBED, _RMS_NORM, _ADD_RMS_NORM, _GATED, _GATHER, _ROPE, _ATTENTION = range(1, 10)
_ARGMAX, _SAMPLE, _TOP_LOGPROBS, _PENALIZE, _DEQUANTIZE = range(10, 15)
_QUANTIZED_LINEAR, _PACK_BLOCKS, _QUANTIZED_EMBED = range(15, 18)

_pack_linear = op_format(4, 5).pack
_pack_pack = op_format(2, 5).pack
_pack_embed = op_format(3, 4, 1).pack
_pack_rms_norm = op_format(3, 4, 1).pack
_pack_add_rms_norm = op_format(5, 5, 1).pack
_pack_gated = op_format(2, 4).pack
_pack_gather = op_format(3, 4).pack
_pack_rope = op_format(7, 11, 1).pack
_pack_attention = op_format(6, 13, 2).pack
_pack_sample = op_format(8, 3).pack
_pack_top_logprobs = op_format(6, 6).pack
_pack_penalize = op_format(3, 3, 3).pack
_pack_dequantize = op_format(2, 3).pack


class CpuKernels(Kernels):
    """Every kernel of the contract, native, on one pool of threads (the caller's thread is one of them).

    head_dim of attention may be any multiple of 16 up to max_head_dim, which sizes the scratch memory. Results do not depend
    on num_threads, on the number of rows in a call, nor on how a prompt was cut into steps.
    """

    name = "cpu"
    can_record = True
    block_types = BLOCK_TYPES

    def __init__(self, library_path: Path, num_threads: int | None = None, max_head_dim: int = 256) -> None:
        self.num_threads = num_threads or len(os.sched_getaffinity(0))
        self.max_head_dim = max_head_dim
        library = NativeLibrary(library_path)
        self.byte_products = library.byte_products
        self._pool = ThreadPool(library, self.num_threads, max_head_dim)
        self._storage = WeightStorage()
        self._recording: Program | None = None

    @property
    def scratch_bytes(self) -> int:
        """Memory the kernels work in, all threads together; resident as far as it was used."""
        return self._pool.scratch_bytes

    def close(self) -> None:
        """End the threads. Weights stay readable; kernels and programs do not run any more."""
        self._pool.close()

    @contextmanager
    def record(self) -> Iterator[Program]:
        """Store the calls made inside instead of running them; afterwards `program.replay()` runs them all in one native call."""
        assert self._recording is None, "recordings do not nest"
        program = Program(self._pool)
        self._recording = program
        try:
            yield program
        finally:
            self._recording = None
        program.finish()

    def _do(self, op: bytes, *tensors: Tensor | None) -> None:
        if self._recording is not None:
            self._recording.append(op, tensors)
        else:
            self._pool.run(op, 1)

    # weights
    def new_linear(self, out_features: int, in_features: int, dtype: torch.dtype) -> LinearWeight:
        storage = self._storage.take(self.linear_num_bytes(out_features, in_features, dtype))
        return PackedWeight(out_features, in_features, dtype, storage, self)

    def linear_num_bytes(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        return packed_num_bytes(out_features, in_features, dtype)

    def new_stored_linear(self, parts: Sequence[StoredRows], in_features: int, dtype: torch.dtype) -> LinearWeight:
        made = [self._new_part(part, in_features, dtype) for part in merged(parts)]
        return made[0] if len(made) == 1 else JoinedWeight(made)

    def _new_part(self, part: StoredRows, in_features: int, dtype: torch.dtype) -> LinearWeight:
        if part.block_type is None:
            return self.new_linear(part.num_rows, in_features, dtype)
        storage = self._storage.take(block_num_bytes(part.num_rows, in_features, part.block_type))
        return BlockWeight(part.num_rows, in_features, dtype, part.block_type, storage, self)

    def stored_num_bytes(self, parts: Sequence[StoredRows], in_features: int, dtype: torch.dtype) -> int:
        return stored_num_bytes(parts, in_features, dtype)

    def pack_blocks(self, weight: BlockWeight, first_row: int, blocks: Tensor) -> None:
        """Store rows of blocks [n, bytes] uint8 at first_row; what `BlockWeight.load_blocks` does."""
        sizes = first_row, blocks.shape[0], weight.in_features, blocks.stride(0), weight.out_features
        op = _pack_pack(_PACK_BLOCKS, 0, 0, weight.block_type, blocks.data_ptr(), weight.data_ptr, *sizes)
        self._pool.run(op, 1)

    def pack_rows(self, weight: PackedWeight, first_row: int, rows: Tensor) -> None:
        """Store rows [n, in_features] of any float dtype at first_row; what `LinearWeight.load_rows` does."""
        if rows.dtype not in _DTYPE or rows.device.type != "cpu":
            rows = rows.to("cpu", torch.float32)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        sizes = (first_row, rows.shape[0], weight.in_features, rows.stride(0), weight.out_features)
        self._pool.run(
            _pack_pack(_PACK, _DTYPE[rows.dtype], _DTYPE[weight.dtype], 0, rows.data_ptr(), weight.data_ptr, *sizes), 1
        )

    # dense
    def linear(self, x: Tensor, weight: LinearWeight, out: Tensor, bias: Tensor | None = None) -> None:
        if isinstance(weight, JoinedWeight):
            first = 0
            for part in weight.parts:
                span = slice(first, first + part.out_features)
                self.linear(x, part, out[:, span], None if bias is None else bias[span])
                first = span.stop
            return
        assert isinstance(weight, PackedWeight | BlockWeight) and x.dtype is weight.dtype
        code, block_type = (_QUANTIZED_LINEAR, weight.block_type) if isinstance(weight, BlockWeight) else (_LINEAR, 0)
        self._do(
            _pack_linear(
                code,
                _DTYPE[x.dtype],
                _DTYPE[out.dtype],
                block_type,
                x.data_ptr(),
                weight.data_ptr,
                out.data_ptr(),
                0 if bias is None else bias.data_ptr(),
                x.shape[0],
                weight.out_features,
                weight.in_features,
                x.stride(0),
                out.stride(0),
            ),
            x,
            weight.storage,
            out,
            bias,
        )

    def embed(self, ids: Tensor, weight: LinearWeight, scale: float, out: Tensor) -> None:
        assert isinstance(weight, PackedWeight | BlockWeight)
        rounded = scale if scale == 1.0 else torch.tensor(scale, dtype=out.dtype).item()
        pointers = ids.data_ptr(), weight.data_ptr, out.data_ptr()
        sizes = ids.shape[0], weight.out_features, weight.in_features, out.stride(0)
        code, kind = (_QUANTIZED_EMBED, weight.block_type) if isinstance(weight, BlockWeight) else (_EMBED, _DTYPE[weight.dtype])
        op = _pack_embed(code, kind, _DTYPE[out.dtype], int(scale != 1.0), *pointers, *sizes, rounded)
        self._do(op, ids, weight.storage, out)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        pointers = x.data_ptr(), weight.data_ptr(), out.data_ptr()
        sizes = x.shape[0], x.shape[1], x.stride(0), out.stride(0)
        self._do(_pack_rms_norm(_RMS_NORM, _DTYPE[x.dtype], _DTYPE[out.dtype], 0, *pointers, *sizes, eps), x, weight, out)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor, post_weight: Tensor | None = None
    ) -> None:
        post = 0 if post_weight is None else post_weight.data_ptr()
        pointers = x.data_ptr(), residual.data_ptr(), weight.data_ptr(), out.data_ptr(), post
        sizes = x.shape[0], x.shape[1], x.stride(0), residual.stride(0), out.stride(0)
        dtypes = _DTYPE[x.dtype], _DTYPE[out.dtype], _DTYPE[residual.dtype]
        self._do(_pack_add_rms_norm(_ADD_RMS_NORM, *dtypes, *pointers, *sizes, eps), x, residual, weight, out, post_weight)

    def gated_activation(self, gate_up: Tensor, out: Tensor, activation: Activation) -> None:
        dtype = _DTYPE[out.dtype]
        sizes = out.shape[0], out.shape[1], gate_up.stride(0), out.stride(0)
        op = _pack_gated(_GATED, dtype, dtype, _ACTIVATION[activation], gate_up.data_ptr(), out.data_ptr(), *sizes)
        self._do(op, gate_up, out)

    def gather_rows(self, x: Tensor, rows: Tensor, out: Tensor) -> None:
        dtype = _DTYPE[x.dtype]
        sizes = out.shape[0], out.shape[1], x.stride(0), out.stride(0)
        self._do(_pack_gather(_GATHER, dtype, dtype, 0, x.data_ptr(), rows.data_ptr(), out.data_ptr(), *sizes), x, rows, out)

    # attention
    def rope_and_cache(
        self,
        qkv: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
        num_heads: int,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        _, _, block_size, kv_heads, head_dim = kv_cache.shape
        pointers = (
            qkv.data_ptr(),
            positions.data_ptr(),
            cos_sin.data_ptr(),
            kv_cache.data_ptr(),
            slot_mapping.data_ptr(),
            0 if q_norm is None else q_norm.data_ptr(),
            0 if k_norm is None else k_norm.data_ptr(),
        )
        sizes = qkv.shape[0], num_heads, kv_heads, head_dim, block_size, qkv.stride(0), cos_sin.stride(0)
        dtypes = _DTYPE[qkv.dtype], _DTYPE[kv_cache.dtype], 0
        self._do(
            _pack_rope(_ROPE, *dtypes, *pointers, *sizes, *kv_cache.stride()[:4], eps),
            *(qkv, positions, cos_sin, kv_cache, slot_mapping, q_norm, k_norm),
        )

    def attention(self, q: Tensor, kv_cache: Tensor, batch: AttentionBatch, scale: float, softcap: float, out: Tensor) -> None:
        _, _, block_size, kv_heads, head_dim = kv_cache.shape
        assert head_dim % 16 == 0 and head_dim <= self.max_head_dim
        tensors = q, kv_cache, batch.block_tables, batch.query_start, batch.seq_lens, out
        sizes = (
            batch.num_seqs,
            kv_heads,
            q.shape[1] // (kv_heads * head_dim),
            head_dim,
            block_size,
            q.stride(0),
            out.stride(0),
            batch.window,
            *kv_cache.stride()[:4],
            batch.block_tables.stride(0),
        )
        dtypes = _DTYPE[q.dtype], _DTYPE[kv_cache.dtype], 0
        self._do(_pack_attention(_ATTENTION, *dtypes, *(t.data_ptr() for t in tensors), *sizes, scale, softcap), *tensors)

    # logits
    def penalize(
        self, logits_row: Tensor, prompt_ids: Tensor, output_ids: Tensor, repetition: float, presence: float, frequency: float
    ) -> None:
        tensors = logits_row, prompt_ids, output_ids
        sizes = logits_row.shape[0], prompt_ids.shape[0], output_ids.shape[0]
        pointers = (t.data_ptr() for t in tensors)
        self._do(_pack_penalize(_PENALIZE, 0, 0, 0, *pointers, *sizes, repetition, presence, frequency), *tensors)

    def sample(self, logits: Tensor, batch: SamplingBatch, out_ids: Tensor) -> None:
        tensors = (logits, batch.temperature, out_ids, batch.top_k, batch.top_p, batch.min_p, batch.seed, batch.position)
        code = _ARGMAX if batch.all_greedy else _SAMPLE
        sizes = logits.shape[0], logits.shape[1], logits.stride(0)
        self._do(_pack_sample(code, 0, 0, 0, *(t.data_ptr() for t in tensors), *sizes), *tensors)

    def top_logprobs(
        self, logits: Tensor, chosen: Tensor, out_chosen: Tensor, out_rank: Tensor, out_ids: Tensor, out_values: Tensor
    ) -> None:
        tensors = logits, chosen, out_chosen, out_rank, out_ids, out_values
        sizes = logits.shape[0], logits.shape[1], logits.stride(0), out_ids.shape[1], out_ids.stride(0), out_values.stride(0)
        self._do(_pack_top_logprobs(_TOP_LOGPROBS, 0, 0, 0, *(t.data_ptr() for t in tensors), *sizes), *tensors)

    # loading
    def dequantize_rows(self, address: int, ggml_type: int, rows: int, cols: int, out: Tensor) -> None:
        """GGUF blocks at an address to out [rows, cols]; `brim.kernels.dequantize` checks the arguments and keeps them alive."""
        dtype = _DTYPE[out.dtype]
        self._pool.run(
            _pack_dequantize(_DEQUANTIZE, dtype, dtype, ggml_type, address, out.data_ptr(), rows, cols, out.stride(0)), 1
        )
