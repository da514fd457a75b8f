"""The kernel contract: one signature a kernel. Owns the abstract `Kernels` and the small values kernels take.

Every backend (`torch_ref`, `cpu`, `triton`) implements exactly these signatures; `torch_ref` is the oracle and always
right. Kernels write into caller-given static buffers and keep nothing; weights are held in the backend's own layout
(`LinearWeight`). Shape letters: T tokens in the step, S sequences, H query heads, K kv heads, D head_dim, V vocab,
R rows of logits, B block size in tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from brim.config.model_spec import ModelSpec
from brim.formats.ggml_type import GGMLType
from brim.kernels.rehearsal import Rehearsal

Activation = Literal["silu", "gelu_tanh"]


class LinearWeight(ABC):
    """A weight matrix [out_features, in_features] in the layout its backend's kernels read.

    Storage exists from construction (its bytes are known before any weight is read); `load_rows` fills it, so fused
    matrices (qkv, gate_up) and streamed files never need a second copy of more than one tensor.
    """

    out_features: int
    in_features: int
    dtype: torch.dtype

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes of device memory held, padding of the layout included."""

    @abstractmethod
    def load_rows(self, first_row: int, rows: Tensor) -> None:
        """Store rows [n, in_features] (any float dtype, on host or device) at out-features first_row.. ."""

    def block_type_of(self, row: int) -> GGMLType | None:
        """The blocks this row and those stored with it are kept in: `load_blocks` fills them. None: floats, see `load_rows`."""
        return None

    def load_blocks(self, first_row: int, blocks: Tensor) -> None:
        """Store rows of blocks [n, bytes] uint8, as a GGUF file has them, at out-features first_row.. ."""
        raise NotImplementedError("this matrix holds no blocks")

    @abstractmethod
    def to_dense(self) -> Tensor:
        """The matrix [out_features, in_features] back in plain layout, for tests."""


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Consecutive rows of a matrix kept alike. block_type: as blocks of that type; None: in the model's dtype."""

    num_rows: int
    block_type: GGMLType | None = None


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """What attention needs to know of one step for one KV group; tensors are views of static input buffers.

    block_tables [S, max_blocks] int32: entry i covers positions i*B..i*B+B-1; entries a sliding window has left
      behind are stale and must never be read.
    slot_mapping [T] int64: block * B + offset where each new token's K/V goes; -1 skips (padding).
    query_start [S+1] int32: sequence s owns tokens query_start[s]..query_start[s+1]-1 (its last query_len positions).
    seq_lens [S] int32: positions after this step, so the query of token j sees 0..its own position.
    """

    block_tables: Tensor
    slot_mapping: Tensor
    query_start: Tensor
    seq_lens: Tensor
    num_seqs: int
    max_query_len: int
    max_seq_len: int
    block_size: int
    window: int  # 0: full attention; else a token sees positions p-window+1 .. p


@dataclass(frozen=True, slots=True)
class FoldedNorm:
    """An RMS norm without a pass of its own, between `add_linear`, which adds to residual [T, N], and the product that reads it
    next. weight [N] f32; hidden [T, N], of the residual's dtype: what the first leaves to the second there is theirs alone."""

    residual: Tensor
    weight: Tensor
    eps: float
    hidden: Tensor


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Per-row sampling parameters [R]; views of static input buffers.

    temperature f32 (0 = greedy); top_k int32 (0 = off); top_p f32 (1 = off); min_p f32 (0 = off); seed int64 and
    position int64 give the row's one uniform number through `uniform_from_seed`, so a token depends on its own
    request only. all_greedy is a host-side hint that lets a backend take the argmax path.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    position: Tensor
    all_greedy: bool


@dataclass(frozen=True, slots=True)
class HostFeed:
    """Inputs and results of decode steps in page-locked host memory, which the device reads and writes itself: N sets for M rows.
    Steps take one set after the other, so N may be in flight.

    A copy of a few bytes before a captured step, and one after it, take the device longer than a short kernel.

    turn [2] int32, on the device: the set of the next step, and how many rows of the present one have ended.
    ids, rows, seeds [N, M] int64, seq_lens, top_k [N, M] int32, temperature, top_p, min_p [N, M] float32: what the host says of
      each row, see `Kernels.resolve_ids`, AttentionBatch and SamplingBatch; length 0: padding. tables: [N, M, blocks] int32 a
      KV group.
    sampled [N, M] int64: what comes back, -1 for a row whose hidden state is not finite.
    """

    turn: Tensor
    ids: Tensor
    rows: Tensor
    seeds: Tensor
    seq_lens: Tensor
    top_k: Tensor
    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    tables: tuple[Tensor, ...]
    sampled: Tensor


@dataclass(frozen=True, slots=True)
class FedStep:
    """A decode step of S rows on the device, see AttentionBatch: ids, rows, positions [S] int64, seq_lens [S] int32; slots [S]
    int64 and tables [S, blocks] int32, one a KV group; last_ids: the last one sampled for each of the rows there are."""

    ids: Tensor
    rows: Tensor
    positions: Tensor
    seq_lens: Tensor
    slots: tuple[Tensor, ...]
    tables: tuple[Tensor, ...]
    sampling: SamplingBatch
    last_ids: Tensor
    block_size: int


class RecordedProgram(Protocol):
    """Kernel calls recorded over static buffers, run again as one."""

    def replay(self) -> None:
        """Run all recorded calls; values are read from the buffers each time."""


class Kernels(ABC):
    """All compute a model step needs. Outputs are written to the `out` buffers; nothing is returned but views."""

    name: str
    can_record: bool = False  # calls can be stored and run again by the backend itself, see `record`
    can_capture: bool = False  # no call waits for the device or allocates: a device graph can hold them all
    plain_weights: bool = False  # a LinearWeight is a row-major tensor, which other code may read
    block_types: frozenset[GGMLType] = frozenset()  # quantised weights that are multiplied as they are, see `new_stored_linear`
    byte_products: str = ""  # what multiplies their bytes, for reports

    def fused_rows(self, spec: ModelSpec, dtype: torch.dtype) -> int:
        """Steps of at most so many tokens take norm_linear, norm_gated_linear and add_linear. For models without biases and
        sandwich norms."""
        return 0

    @property
    def scratch_bytes(self) -> int:
        """Memory the kernels work in, allocated at construction."""
        return 0

    def record(self) -> AbstractContextManager[RecordedProgram]:
        """Store the calls made inside instead of running them; only where `can_record`."""
        raise NotImplementedError(f"{self.name} kernels do not record")

    def rehearsal(self) -> Rehearsal | None:
        """The same kernels where nothing runs, to find out what they would compile; None where they compile nothing."""
        return None

    def start_libraries(self) -> None:  # noqa: B027  (not every backend calls libraries that keep memory)
        """What libraries keep for good they take now, in memory of its own. Later it would lie in what a compiler or a tuner
        took and gave back to torch's allocator, and nothing around it could go back to the device (vllm #54122)."""

    def close(self) -> None:  # noqa: B027  (nothing to give back is a fine default)
        """Give threads and scratch memory back."""

    # weights
    def reserve_weights(self, num_bytes: int) -> None:  # noqa: B027  (a backend may allocate each matrix on its own)
        """The next matrices made by `new_linear` take this many bytes together: allocate them at once, with no gaps."""

    @abstractmethod
    def new_linear(self, out_features: int, in_features: int, dtype: torch.dtype) -> LinearWeight:
        """Allocate a weight matrix in this backend's layout."""

    @abstractmethod
    def linear_num_bytes(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """Bytes `new_linear` will hold, computed without allocating."""

    def new_stored_linear(self, parts: Sequence[StoredRows], in_features: int, dtype: torch.dtype) -> LinearWeight:
        """A matrix of the parts one below the other, for x of `dtype`. Their block types are among `block_types`."""
        assert not any(part.block_type for part in parts), f"{self.name} kernels keep no blocks"
        return self.new_linear(sum(part.num_rows for part in parts), in_features, dtype)

    def stored_num_bytes(self, parts: Sequence[StoredRows], in_features: int, dtype: torch.dtype) -> int:
        """Bytes `new_stored_linear` will hold, computed without allocating."""
        assert not any(part.block_type for part in parts), f"{self.name} kernels keep no blocks"
        return self.linear_num_bytes(sum(part.num_rows for part in parts), in_features, dtype)

    # dense
    @abstractmethod
    def linear(self, x: Tensor, weight: LinearWeight, out: Tensor, bias: Tensor | None = None) -> None:
        """out[T, out_features] = x[T, in_features] @ weight.T (+ bias[out_features] f32). x has the weight's dtype; out has it
        too or is float32 (logits). Rows of x and out may be strided (stride(1) == 1). Accumulates in float32."""

    @abstractmethod
    def embed(self, ids: Tensor, weight: LinearWeight, scale: float, out: Tensor) -> None:
        """out[T, hidden] = weight[ids[T] int64] * scale; with scale != 1 the product is rounded once to out's dtype, scale itself
        first rounded to out's dtype (as Gemma does). ids outside the vocabulary are undefined."""

    @abstractmethod
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        """out[T, N] = x / sqrt(mean(x^2) + eps) * weight[N] f32, computed in float32, rounded once; out may be x."""

    @abstractmethod
    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor, post_weight: Tensor | None = None
    ) -> None:
        """residual[T, N] += x (or += rms_norm(x, post_weight) where given, as Gemma's sandwich norms do), then
        out[T, N] = rms_norm(residual, weight). The sum is rounded to residual's dtype before it is normed; out may be x."""

    @abstractmethod
    def gated_activation(self, gate_up: Tensor, out: Tensor, activation: Activation) -> None:
        """out[T, N] = act(gate_up[T, :N]) * gate_up[T, N:2N], computed in float32; out may be gate_up[:, :N]."""

    def gated_linear(
        self, x: Tensor, weight: LinearWeight, gate_up: Tensor, out: Tensor, activation: Activation, bias: Tensor | None = None
    ) -> None:
        """out[T, N] = act(gate) * up, the halves of x[T, K] @ weight[2N, K].T (+ bias[2N] f32). gate_up[T, 2N] is there to hold
        them and may be left as it was; out may be gate_up[:, :N]."""
        self.linear(x, weight, gate_up, bias)
        self.gated_activation(gate_up, out, activation)

    @abstractmethod
    def gather_rows(self, x: Tensor, rows: Tensor, out: Tensor) -> None:
        """out[R, N] = x[rows[R] int64]."""

    # products with their neighbours, for at most fused_rows rows; without biases
    def add_linear(self, x: Tensor, weight: LinearWeight, norm: FoldedNorm) -> None:
        """norm.residual[T, N] += x[T, K] @ weight.T, the sum made in float32 and rounded once."""
        raise NotImplementedError(f"{self.name} kernels fuse no products")

    def norm_linear(self, norm: FoldedNorm, weight: LinearWeight, out: Tensor) -> None:
        """out[T, N] = rms_norm(norm.residual[T, K]) @ weight.T, the normed rows rounded at most once. For several rows the call
        just before is add_linear with this norm."""
        raise NotImplementedError(f"{self.name} kernels fuse no products")

    def norm_gated_linear(self, norm: FoldedNorm, weight: LinearWeight, activation: Activation, out: Tensor) -> None:
        """out[T, N] = act(gate) * up, where gate and up are the halves of rms_norm(norm.residual[T, K]) @ weight[2N, K].T in
        float32. See norm_linear."""
        raise NotImplementedError(f"{self.name} kernels fuse no products")

    # tokens that the host does not know yet
    def resolve_ids(self, ids: Tensor, rows: Tensor, last_ids: Tensor) -> None:
        """ids[i] = last_ids[rows[i] int64] where ids[i] int64 is negative, else it stays."""
        known = torch.clamp(ids, min=0)
        torch.where(ids < 0, last_ids[rows], known, out=ids)

    def remember_ids(self, ids: Tensor, rows: Tensor, last_ids: Tensor) -> None:
        """last_ids[rows[i] int64] = ids[i]; rows that repeat hold padding."""
        last_ids.index_copy_(0, rows, ids)

    # decode steps that read host memory, see `HostFeed`
    def begin_decodes(self, feed: HostFeed, step: FedStep) -> None:
        """What the set whose turn it is says of the step's rows: ids (resolved, see resolve_ids), rows, lengths, tables as far as
        the length goes, sampling parameters (position: the length); with them positions (length - 1, at least 0) and slots
        (-1 for padding)."""
        turn, count = int(feed.turn[0]), len(step.ids)
        step.ids.copy_(feed.ids[turn, :count])
        step.rows.copy_(feed.rows[turn, :count])
        self.resolve_ids(step.ids, step.rows, step.last_ids)
        step.seq_lens.copy_(feed.seq_lens[turn, :count])
        torch.sub(step.seq_lens, 1, out=step.positions).clamp_(min=0)
        sampling = step.sampling
        sampling.seed.copy_(feed.seeds[turn, :count])
        sampling.position.copy_(step.seq_lens)
        for name in ("top_k", "temperature", "top_p", "min_p"):
            getattr(sampling, name).copy_(getattr(feed, name)[turn, :count])
        for source, table, slots in zip(feed.tables, step.tables, step.slots, strict=True):
            for row, length in enumerate(step.seq_lens.tolist()):
                used = -(-length // step.block_size)
                table[row, :used] = source[turn, row, :used]
            last = step.positions // step.block_size
            slots.copy_(table.gather(1, last[:, None])[:, 0] * step.block_size + step.positions % step.block_size)
            slots[step.seq_lens == 0] = -1

    def end_decodes(self, feed: HostFeed, step: FedStep, hidden: Tensor, ids: Tensor) -> None:
        """ids[S] int64, sampled from hidden[S, N], go to the host and to last_ids; the turn goes to the next set."""
        turn = int(feed.turn[0])
        self.remember_ids(ids, step.rows, step.last_ids)
        finite = torch.isfinite(hidden.sum(dim=-1, dtype=torch.float32))
        feed.sampled[turn, : len(ids)].copy_(torch.where(finite, ids, -1))
        feed.turn[0] = (turn + 1) % len(feed.ids)

    # attention
    @abstractmethod
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
        """For qkv[T, (H+2K)*D], in place on q: optional per-head RMS norm of q and k (weights [D] f32), rotate-half rotary
        embedding by cos_sin[max_position, D] f32 (first D/2 cos, last D/2 sin) at positions[T] int64; k (rotated) and v go
        to kv_cache[num_blocks, 2, B, K, D] (strided view, innermost contiguous) at slot_mapping[T]. q stays in qkv."""

    @abstractmethod
    def attention(self, q: Tensor, kv_cache: Tensor, batch: AttentionBatch, scale: float, softcap: float, out: Tensor) -> None:
        """Causal paged attention: out[T, H*D] from q[T, H*D] (strided rows) over the cache, grouped heads, optional window
        (batch.window) and logit soft-capping (softcap > 0: softcap * tanh(s / softcap)). Softmax in float32.
        Covers prefill, chunked prefill, decode and mixes of them."""

    # logits
    @abstractmethod
    def penalize(
        self, logits_row: Tensor, prompt_ids: Tensor, output_ids: Tensor, repetition: float, presence: float, frequency: float
    ) -> None:
        """In place on logits_row[V] f32: repetition (over prompt and output, divide if > 0 else multiply), then frequency * count
        and presence over output ids (OpenAI's definition). Ids are int64 and may repeat."""

    @abstractmethod
    def sample(self, logits: Tensor, batch: SamplingBatch, out_ids: Tensor) -> None:
        """out_ids[R] int64 from logits[R, V] f32, which may be overwritten. Greedy rows: argmax, lowest id on ties. Else
        softmax(logits / temperature); keep top_k; of those the smallest set whose probability reaches top_p; of those with
        p >= min_p * max; then inverse-CDF in id order with the row's uniform number (`uniform_from_seed`)."""

    @abstractmethod
    def top_logprobs(
        self, logits: Tensor, chosen: Tensor, out_chosen: Tensor, out_rank: Tensor, out_ids: Tensor, out_values: Tensor
    ) -> None:
        """Log-softmax statistics of logits[R, V] f32 before temperature: out_chosen[R] f32 that of chosen[R] int64,
        out_rank[R] int64 its rank (1 = best), out_ids[R, N] int64 and out_values[R, N] f32 the N best in order."""
