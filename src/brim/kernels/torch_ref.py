"""The reference kernels: plain torch, always right, any float dtype and any device. Owns `TorchKernels`.

This is the oracle the other backends are tested against and the fallback where they cannot run. It favours the plain
statement of each formula over speed: it may allocate temporaries and may read lengths back to the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from brim.kernels.base import Activation, AttentionBatch, Kernels, LinearWeight, SamplingBatch

_WEIGHT_CHUNK_ROWS = 16384
_SPLITMIX_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_SPLITMIX_MIX1 = 0xBF58476D1CE4E5B9 - 2**64
_SPLITMIX_MIX2 = 0x94D049BB133111EB - 2**64


class TorchLinearWeight(LinearWeight):
    """A weight matrix as a plain row-major tensor [out_features, in_features], in memory of its own or in `storage`."""

    def __init__(
        self, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device, storage: Tensor | None = None
    ) -> None:
        self.out_features = out_features
        self.in_features = in_features
        self.dtype = dtype
        if storage is None:
            self.storage = torch.zeros(out_features, in_features, dtype=dtype, device=device)
        else:
            self.storage = storage.view(dtype).view(out_features, in_features)

    @property
    def num_bytes(self) -> int:
        return self.storage.numel() * self.storage.element_size()

    def load_rows(self, first_row: int, rows: Tensor) -> None:
        self.storage[first_row : first_row + rows.shape[0]].copy_(rows)

    def to_dense(self) -> Tensor:
        return self.storage.clone()


class TorchKernels(Kernels):
    """Every kernel of the contract in plain torch on one device."""

    name = "torch"
    plain_weights = True

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    # weights
    def new_linear(self, out_features: int, in_features: int, dtype: torch.dtype) -> LinearWeight:
        return TorchLinearWeight(out_features, in_features, dtype, self.device)

    def linear_num_bytes(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        return out_features * in_features * dtype.itemsize

    # dense
    def linear(self, x: Tensor, weight: LinearWeight, out: Tensor, bias: Tensor | None = None) -> None:
        dense = _dense(weight)
        if bias is None and out.dtype == dense.dtype:
            out.copy_(torch.nn.functional.linear(x, dense))
            return
        x32 = x.float()
        for first in range(0, weight.out_features, _WEIGHT_CHUNK_ROWS):
            part = slice(first, min(first + _WEIGHT_CHUNK_ROWS, weight.out_features))
            product = x32 @ dense[part].float().T
            out[:, part] = product if bias is None else product + bias[part]

    def embed(self, ids: Tensor, weight: LinearWeight, scale: float, out: Tensor) -> None:
        rows = _dense(weight)[ids]
        if scale != 1.0:
            rounded = torch.tensor(scale, dtype=out.dtype).item()
            rows = rows.float() * rounded
        out.copy_(rows)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        out.copy_(_rms_norm(x, weight, eps))

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor, post_weight: Tensor | None = None
    ) -> None:
        added = x.float() if post_weight is None else _rms_norm(x, post_weight, eps)
        residual.copy_(residual.float() + added)
        out.copy_(_rms_norm(residual, weight, eps))

    def gated_activation(self, gate_up: Tensor, out: Tensor, activation: Activation) -> None:
        width = out.shape[-1]
        gate, up = gate_up[:, :width].float(), gate_up[:, width : 2 * width].float()
        if activation == "silu":
            active = torch.nn.functional.silu(gate)
        else:
            active = torch.nn.functional.gelu(gate, approximate="tanh")
        out.copy_(active * up)

    def gather_rows(self, x: Tensor, rows: Tensor, out: Tensor) -> None:
        out.copy_(x[rows])

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
        """See the contract. Norm and rotation are computed in float32 and rounded once, at the end."""
        _, _, block_size, kv_heads, head_dim = kv_cache.shape
        heads = qkv[:, : (num_heads + 2 * kv_heads) * head_dim].view(qkv.shape[0], -1, head_dim)
        q, k, v = heads[:, :num_heads], heads[:, num_heads : num_heads + kv_heads], heads[:, num_heads + kv_heads :]
        q32 = q.float() if q_norm is None else _rms_norm(q, q_norm, eps)
        k32 = k.float() if k_norm is None else _rms_norm(k, k_norm, eps)
        cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)  # each [T, 1, D/2]
        q.copy_(_rotate(q32, cos, sin))
        kept = slot_mapping >= 0
        slots = slot_mapping[kept]
        blocks, offsets = torch.div(slots, block_size, rounding_mode="floor"), slots % block_size
        kv_cache[blocks, 0, offsets] = _rotate(k32, cos, sin)[kept].to(kv_cache.dtype)
        kv_cache[blocks, 1, offsets] = v[kept].to(kv_cache.dtype)

    def attention(self, q: Tensor, kv_cache: Tensor, batch: AttentionBatch, scale: float, softcap: float, out: Tensor) -> None:
        """See the contract. Rows of sequences of length 0 (padding) are written as zeros."""
        starts, lens = batch.query_start.tolist(), batch.seq_lens.tolist()
        for seq in range(batch.num_seqs):
            first, last = starts[seq], starts[seq + 1]
            if last <= first:
                continue
            if lens[seq] == 0:
                out[first:last].zero_()
                continue
            out[first:last] = _attend(q[first:last], kv_cache, batch, seq, lens[seq], scale, softcap).to(out.dtype)

    # logits
    def penalize(
        self, logits_row: Tensor, prompt_ids: Tensor, output_ids: Tensor, repetition: float, presence: float, frequency: float
    ) -> None:
        if repetition != 1.0:
            seen = _unique(torch.cat([prompt_ids, output_ids]))[0]
            old = logits_row[seen]
            logits_row[seen] = torch.where(old > 0, old / repetition, old * repetition)
        if output_ids.numel():
            ids, counts = _unique(output_ids)
            logits_row[ids] -= frequency * counts.float() + presence

    def sample(self, logits: Tensor, batch: SamplingBatch, out_ids: Tensor) -> None:
        """See the contract. Values tied with the last one kept by top_k or top_p are kept: the set depends on values only."""
        greedy = _first_argmax(logits)
        if batch.all_greedy:
            out_ids.copy_(greedy)
            return
        temperature = torch.where(batch.temperature > 0, batch.temperature, 1.0).unsqueeze(1)
        scaled = logits / temperature
        probs = (scaled - scaled.amax(1, keepdim=True)).exp().double()
        probs = torch.where(probs >= _keep_threshold(probs, batch), probs, 0.0)
        cumulative = probs.cumsum(1)
        target = uniform_tensor(batch.seed, batch.position).double().unsqueeze(1) * cumulative[:, -1:]
        picked = (cumulative > target).to(torch.uint8).argmax(1)
        out_ids.copy_(torch.where(batch.temperature > 0, picked, greedy))

    def top_logprobs(
        self, logits: Tensor, chosen: Tensor, out_chosen: Tensor, out_rank: Tensor, out_ids: Tensor, out_values: Tensor
    ) -> None:
        """See the contract. Equal values are listed by id; the rank counts strictly larger ones."""
        total = torch.logsumexp(logits, dim=1, keepdim=True)
        picked = logits.gather(1, chosen.unsqueeze(1))
        out_chosen.copy_((picked - total).squeeze(1))
        out_rank.copy_((logits > picked).sum(1) + 1)
        width = out_ids.shape[1]
        values, ids = logits.sort(dim=1, descending=True, stable=True)
        out_ids.copy_(ids[:, :width])
        out_values.copy_(values[:, :width] - total)


def uniform_tensor(seed: Tensor, position: Tensor) -> Tensor:
    """`uniform_from_seed` on any device: [R] int64, [R] int64 -> [R] float32 in [0, 1), bit for bit the same."""
    mixed = _splitmix64(_splitmix64(seed) + position)
    return _shift_right(mixed, 40).to(torch.float32) * 2.0**-24


def _splitmix64(state: Tensor) -> Tensor:
    z = state + _SPLITMIX_GAMMA
    z = (z ^ _shift_right(z, 30)) * _SPLITMIX_MIX1
    z = (z ^ _shift_right(z, 27)) * _SPLITMIX_MIX2
    return z ^ _shift_right(z, 31)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical shift of int64 taken as uint64."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _dense(weight: LinearWeight) -> Tensor:
    assert isinstance(weight, TorchLinearWeight), "a weight of another backend"
    return weight.storage


def _unique(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct values of ids and how often each occurs."""
    values, counts = torch.unique(ids, return_counts=True)
    return values, counts


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    return x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half on [T, heads, D] by cos and sin [T, 1, D/2], all float32."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def _attend(q: Tensor, kv_cache: Tensor, batch: AttentionBatch, seq: int, seq_len: int, scale: float, softcap: float) -> Tensor:
    """Attention of one sequence: q [t, H*D], its last t positions, over its cache -> [t, H*D] float32."""
    _, _, block_size, kv_heads, head_dim = kv_cache.shape
    query_len = q.shape[0]
    query_pos = torch.arange(seq_len - query_len, seq_len, device=q.device)
    lowest = max(0, seq_len - query_len - batch.window + 1) if batch.window else 0
    first_block = lowest // block_size
    table = batch.block_tables[seq, first_block : (seq_len + block_size - 1) // block_size].long()
    pages = kv_cache[table].float()  # [blocks, 2, B, K, D]
    begin, end = lowest - first_block * block_size, seq_len - first_block * block_size
    k = pages[:, 0].flatten(0, 1)[begin:end]  # [n, K, D]
    v = pages[:, 1].flatten(0, 1)[begin:end]
    key_pos = torch.arange(lowest, seq_len, device=q.device)
    q32 = q.float().reshape(query_len, kv_heads, -1, head_dim)  # [t, K, G, D]
    scores = torch.einsum("tkgd,nkd->kgtn", q32, k) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    visible = key_pos <= query_pos.unsqueeze(1)
    if batch.window:
        visible &= key_pos > query_pos.unsqueeze(1) - batch.window
    probs = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("kgtn,nkd->tkgd", probs, v).flatten(1)


def _first_argmax(logits: Tensor) -> Tensor:
    """Lowest id of the largest value per row, whatever order argmax itself would prefer."""
    best = logits.amax(1, keepdim=True)
    return (logits == best).to(torch.uint8).argmax(1)


def _keep_threshold(probs: Tensor, batch: SamplingBatch) -> Tensor:
    """The smallest unnormalised probability kept per row, [R, 1] float64; probs is scaled so that its largest is 1.

    Example: probs 1, .6, .3, .1 with top_k 3 leaves 1.9; top_p 0.8 needs 1.52, reached by 1 + .6: the answer is .6.
    """
    vocab = probs.shape[1]
    ordered = probs.sort(dim=1, descending=True).values
    top_k = torch.where(batch.top_k > 0, batch.top_k, vocab).clamp(max=vocab).long().unsqueeze(1)
    kth = ordered.gather(1, top_k - 1)
    mass = torch.where(ordered >= kth, ordered, 0.0).cumsum(1)
    needed = batch.top_p.double().unsqueeze(1) * mass[:, -1:]
    reached = (mass >= needed).to(torch.uint8).argmax(1, keepdim=True)
    nucleus = torch.where(batch.top_p.unsqueeze(1) < 1, ordered.gather(1, reached), 0.0)
    return torch.maximum(torch.maximum(kth, nucleus), batch.min_p.double().unsqueeze(1))
