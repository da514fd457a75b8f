"""The Triton backend: each kernel of the contract on an accelerator. Owns `TritonKernels`.

No call allocates device memory or waits for the device, and every call can be captured in a CUDA graph. Two things happen at
the first call of each kind and belong in warm-up: Triton compiles and loads a kernel (one variant per dtype and class of
shape, see `tuning`), and the matrix library takes its workspace, once per stream: 32 MiB on Hopper, taken for the stream that is
current when the kernels are made. Capture graphs on the stream that eager steps run on, or the capture takes a second one.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from triton.runtime.cache import triton_key
from triton.runtime.driver import driver

from brim.config.model_spec import ModelSpec
from brim.kernels.base import Activation, AttentionBatch, FedStep, FoldedNorm, HostFeed, Kernels, LinearWeight, SamplingBatch
from brim.kernels.torch_ref import TorchLinearWeight
from brim.kernels.triton import dense
from brim.kernels.triton.attention import AttentionLauncher, PrefillLauncher
from brim.kernels.triton.cache_folder import replace_unwritable_cache
from brim.kernels.triton.chip import Chip, chip_of
from brim.kernels.triton.choice import CHOSEN, KernelChoice
from brim.kernels.triton.feed_launcher import FeedLauncher
from brim.kernels.triton.launch import Launch, depending, launch_now
from brim.kernels.triton.logprobs import count_ids_kernel, penalize_kernel, top_logprobs_kernel
from brim.kernels.triton.matmul import matmul_kernel
from brim.kernels.triton.products import ProductLauncher
from brim.kernels.triton.rehearsal import TritonRehearsal
from brim.kernels.triton.rope import rope_and_cache_kernel
from brim.kernels.triton.sampling import chunk_best_kernel, chunk_sum_kernel, pick_kernel, threshold_kernel
from brim.kernels.triton.scratch import KernelLimits, Scratch, matrix_num_bytes
from brim.kernels.triton.tokens import remember_ids_kernel, resolve_ids_kernel
from brim.kernels.triton.tuning import (
    ELEMENTWISE_BLOCK,
    ELEMENTWISE_WARPS,
    FEW_ROWS,
    SAMPLE_CHUNK,
    SAMPLE_PART,
    SEARCH_BLOCK,
    SEARCH_WARPS,
    TOKEN_BLOCK,
    next_power_of_2,
    norm_warps,
    product_tile,
    rope_heads,
)
from brim.units import ceil_div

if TYPE_CHECKING:
    from brim.kernels.triton.hopper_products import HopperProducts


class TritonKernels(Kernels):
    """Every kernel of the contract on one device, which must be torch's current one.

    limits sizes the scratch memory, all of it allocated here. A device without Triton's compiler is a DeviceError.
    """

    name = "triton"
    can_capture = True
    plain_weights = True

    def __init__(
        self,
        device: torch.device | str,
        limits: KernelLimits,
        chip: Chip | None = None,
        launch: Launch = launch_now,
        choice: KernelChoice = CHOSEN,
    ) -> None:
        """chip: what the device can do, asked of it where None. launch: what becomes of each call of a kernel. choice: which of
        several kernels for the same are used."""
        self.device = torch.device(device)
        runs_here = self.device.type not in ("cpu", "meta")
        self._cache_folder = replace_unwritable_cache() if runs_here else None
        self._hashing = threading.Thread(target=triton_key, name="triton-key", daemon=True)  # of Triton itself: 0.4 s
        if runs_here:
            self._hashing.start()
        self.limits = limits
        self.chip = chip or chip_of(self.device)
        self.choice = choice
        self._launch_in_order = launch
        launch = depending(launch) if choice.dependent_launch and self.chip.dependent_launch else launch
        self._launch = launch
        self._products, self._feed = ProductLauncher(launch), FeedLauncher(launch)
        self._scratch = Scratch(limits, self.chip.num_cores, self.device)
        on_hopper = choice.hopper and self.chip.hopper
        self._narrow = _hopper_products(launch, self.chip.num_cores, self._scratch) if on_hopper else None
        self._own_rows = FEW_ROWS if on_hopper else int(choice.fused_row)
        prefill = _hopper_launcher(launch, limits) if on_hopper else None
        cores = self.chip.num_cores
        parts = limits.decode_parts(cores)
        self._attention = AttentionLauncher(limits, self._scratch, parts, cores, launch, prefill, deep_chunks=on_hopper)
        self._slab, self._slab_used = torch.empty(0, dtype=torch.uint8, device=self.device), 0

    def start_libraries(self) -> None:
        """One small product: the matrix library's workspace on this stream."""
        if self.device.type not in ("cpu", "meta"):
            small = torch.zeros(16, 16, dtype=torch.bfloat16, device=self.device)
            torch.mm(small, small)

    def fused_rows(self, spec: ModelSpec, dtype: torch.dtype) -> int:
        """See the contract. Several rows only in bfloat16, whose range holds rows that are not divided by their size yet."""
        if not self.choice.fused_row:
            return 0
        if not self.choice.split_norm or self._narrow is None or dtype != torch.bfloat16:
            return 1
        depths = (spec.num_heads * spec.head_dim, spec.intermediate_size)
        return FEW_ROWS if self._narrow.adds_to(spec.hidden_size, depths) else 1

    @property
    def num_cores(self) -> int:
        """Multiprocessors that the work is cut for."""
        return self.chip.num_cores

    @property
    def scratch_bytes(self) -> int:
        return self._scratch.num_bytes

    def rehearsal(self) -> TritonRehearsal | None:
        """See the contract. Triton's interpreter, which stands in on a CPU, compiles nothing."""
        if self.device.type == "cpu":
            return None
        target = driver.active.get_current_target()
        return TritonRehearsal(
            target,
            lambda device, launch: TritonKernels(device, self.limits, self.chip, launch, self.choice),
            self._hashing.join,
        )

    def close(self) -> None:
        if self._cache_folder is not None:
            self._cache_folder.cleanup()

    # weights
    def reserve_weights(self, num_bytes: int) -> None:
        self._slab, self._slab_used = torch.zeros(num_bytes, dtype=torch.uint8, device=self.device), 0

    def new_linear(self, out_features: int, in_features: int, dtype: torch.dtype) -> LinearWeight:
        start, held = self._slab_used, self.linear_num_bytes(out_features, in_features, dtype)
        storage = None
        if start + held <= len(self._slab):
            storage = self._slab[start : start + out_features * in_features * dtype.itemsize]
            self._slab_used += held
        return TorchLinearWeight(out_features, in_features, dtype, self.device, storage)

    def linear_num_bytes(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        return matrix_num_bytes(out_features, in_features, dtype)

    # dense
    def linear(self, x: Tensor, weight: LinearWeight, out: Tensor, bias: Tensor | None = None) -> None:
        """See the contract. A bias is added to the product after that was rounded to out's dtype."""
        matrix = _matrix(weight)
        is_wide = out.dtype != matrix.dtype
        if bias is None and self._own_product(x, matrix, out):
            return
        if is_wide and not self.chip.wide_products:
            self._multiply(x, matrix, out, bias)
            return
        if x.is_meta:  # a rehearsal: nothing to compile, and the library's first product there takes half a second of imports
            pass
        elif is_wide:
            torch.mm(x, matrix.t(), out_dtype=out.dtype, out=out)
        else:
            torch.mm(x, matrix.t(), out=out)
        if bias is not None:
            grid = (out.shape[0], ceil_div(out.shape[1], ELEMENTWISE_BLOCK))
            self._launch(
                dense.add_bias_kernel, grid, out, bias, out.stride(0), WIDTH=out.shape[1], BLOCK=ELEMENTWISE_BLOCK,
                num_warps=ELEMENTWISE_WARPS,
            )  # fmt: skip

    def _multiply(self, x: Tensor, matrix: Tensor, out: Tensor, bias: Tensor | None) -> None:
        """The product with float32 results, by our own kernel."""
        rows, (cols, depth) = x.shape[0], matrix.shape
        block = 16 if rows <= 16 else 64
        self._launch(
            matmul_kernel, (ceil_div(cols, 64), ceil_div(rows, block)), x, matrix, matrix if bias is None else bias, out, rows,
            x.stride(0), matrix.stride(0), out.stride(0), COLS=cols, DEPTH=depth, ROWS_BLOCK=block, COLS_BLOCK=64, DEPTH_BLOCK=64,
            HAS_BIAS=bias is not None, num_warps=4, num_stages=4,
        )  # fmt: skip

    def gated_linear(
        self, x: Tensor, weight: LinearWeight, gate_up: Tensor, out: Tensor, activation: Activation, bias: Tensor | None = None
    ) -> None:
        if bias is not None or not self._own_product(x, _matrix(weight), out, activation):
            super().gated_linear(x, weight, gate_up, out, activation, bias)

    def _own_product(self, x: Tensor, matrix: Tensor, out: Tensor, activation: Activation | None = None) -> bool:
        """A product of one row or few by our own kernels; False where the library's is to be taken."""
        rows, size = x.shape[0], x.element_size()
        if rows > self._own_rows or (rows > 1 and size != 2):
            return False
        if rows > 1 and activation is None and self._narrow is not None and self._narrow.suits(x, matrix, out):
            self._narrow.launch(x, matrix, out)
            return True
        tile = product_tile(rows, out.shape[1], x.shape[1], gated=activation is not None, element_bytes=size)
        self._products.launch(x, matrix, out, tile, activation=activation)
        return True

    def add_linear(self, x: Tensor, weight: LinearWeight, norm: FoldedNorm) -> None:
        matrix = _matrix(weight)
        if x.shape[0] > 1:
            assert self._narrow is not None, "more rows than are fused"
            self._narrow.launch_added(x, matrix, norm.residual, norm.weight, norm.hidden)
            return
        tile = product_tile(1, *matrix.shape, gated=False, element_bytes=x.element_size())
        self._products.launch(x, matrix, norm.residual, tile, added=True)

    def norm_linear(self, norm: FoldedNorm, weight: LinearWeight, out: Tensor) -> None:
        self._multiply_normed(norm, _matrix(weight), out, None)

    def norm_gated_linear(self, norm: FoldedNorm, weight: LinearWeight, activation: Activation, out: Tensor) -> None:
        self._multiply_normed(norm, _matrix(weight), out, activation)

    def _multiply_normed(self, norm: FoldedNorm, matrix: Tensor, out: Tensor, activation: Activation | None) -> None:
        """One row is normed by the product itself; of several, add_linear did one half."""
        x = norm.residual
        rows, width = x.shape
        tile = product_tile(rows, out.shape[1], width, gated=activation is not None, element_bytes=x.element_size())
        if rows == 1:
            self._products.launch(x, matrix, out, tile, norm=norm.weight, eps=norm.eps, activation=activation)
            return
        assert self._narrow is not None, "more rows than are fused"
        squares = self._narrow.squares_of(width)
        self._products.launch(norm.hidden, matrix, out, tile, squares=squares, eps=norm.eps, activation=activation)

    def embed(self, ids: Tensor, weight: LinearWeight, scale: float, out: Tensor) -> None:
        """See the contract. Begins a step: what wrote the step's inputs ends before it starts, and so before all that follows."""
        rounded = 1.0 if scale == 1.0 else torch.tensor(scale, dtype=out.dtype, device="cpu").item()
        self._gather(self._launch_in_order, _matrix(weight), ids, out, rounded, scaled=scale != 1.0)

    def gather_rows(self, x: Tensor, rows: Tensor, out: Tensor) -> None:
        self._gather(self._launch, x, rows, out, 1.0, scaled=False)

    def _gather(self, launch: Launch, source: Tensor, rows: Tensor, out: Tensor, scale: float, *, scaled: bool) -> None:
        width = out.shape[1]
        launch(
            dense.gather_kernel, (out.shape[0], ceil_div(width, ELEMENTWISE_BLOCK)), source, rows, out, scale,
            source.stride(0), out.stride(0), WIDTH=width, BLOCK=ELEMENTWISE_BLOCK, SCALED=scaled, num_warps=ELEMENTWISE_WARPS,
        )  # fmt: skip

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        rows, width = x.shape
        self._launch(
            dense.rms_norm_kernel, (rows,), x, weight, out, eps, x.stride(0), out.stride(0), WIDTH=width,
            BLOCK=next_power_of_2(width), num_warps=norm_warps(width),
        )  # fmt: skip

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor, post_weight: Tensor | None = None
    ) -> None:
        rows, width = x.shape
        self._launch(
            dense.add_rms_norm_kernel, (rows,), x, residual, weight, weight if post_weight is None else post_weight, out, eps,
            x.stride(0), residual.stride(0), out.stride(0), WIDTH=width, BLOCK=next_power_of_2(width),
            HAS_POST=post_weight is not None, num_warps=norm_warps(width),
        )  # fmt: skip

    def gated_activation(self, gate_up: Tensor, out: Tensor, activation: Activation) -> None:
        rows, width = out.shape
        self._launch(
            dense.gated_activation_kernel, (rows, ceil_div(width, ELEMENTWISE_BLOCK)), gate_up, out, gate_up.stride(0),
            out.stride(0), WIDTH=width, BLOCK=ELEMENTWISE_BLOCK, GELU=activation == "gelu_tanh", num_warps=ELEMENTWISE_WARPS,
        )  # fmt: skip

    # tokens that the host does not know yet
    def resolve_ids(self, ids: Tensor, rows: Tensor, last_ids: Tensor) -> None:
        count = len(rows)
        grid = (ceil_div(count, TOKEN_BLOCK),)
        self._launch(resolve_ids_kernel, grid, ids, rows, last_ids, count, BLOCK=TOKEN_BLOCK, num_warps=1)

    def remember_ids(self, ids: Tensor, rows: Tensor, last_ids: Tensor) -> None:
        count = len(rows)
        grid = (ceil_div(count, TOKEN_BLOCK),)
        self._launch(remember_ids_kernel, grid, ids, rows, last_ids, count, BLOCK=TOKEN_BLOCK, num_warps=1)

    def begin_decodes(self, feed: HostFeed, step: FedStep) -> None:
        self._feed.begin(feed, step)

    def end_decodes(self, feed: HostFeed, step: FedStep, hidden: Tensor, ids: Tensor) -> None:
        self._feed.end(feed, step, hidden, ids)

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
        """See the contract. q_norm and k_norm come together or not at all."""
        assert (q_norm is None) == (k_norm is None), "one of two head norms"
        _, _, block_size, kv_heads, head_dim = kv_cache.shape
        num_tokens = qkv.shape[0]
        heads = min(rope_heads(num_tokens), next_power_of_2(kv_heads))
        blocks = ceil_div(num_heads, heads) + 2 * ceil_div(kv_heads, heads)
        unused = cos_sin  # a pointer nothing reads through
        self._launch(
            rope_and_cache_kernel, (num_tokens, blocks), qkv, positions, cos_sin, kv_cache, slot_mapping,
            unused if q_norm is None else q_norm, unused if k_norm is None else k_norm, eps, qkv.stride(0), cos_sin.stride(0),
            *kv_cache.stride()[:4], HEADS=num_heads, KV_HEADS=kv_heads, HALF=head_dim // 2,
            HALF_PAD=next_power_of_2(head_dim // 2), BLOCK_SIZE=block_size, HEADS_BLOCK=heads, NORMED=q_norm is not None,
            num_warps=1 if heads <= 2 else 4,
        )  # fmt: skip

    def attention(self, q: Tensor, kv_cache: Tensor, batch: AttentionBatch, scale: float, softcap: float, out: Tensor) -> None:
        """See the contract. Sequences with one new token go through split-KV attention, the others through prefill
        attention, in any mix and order; rows of sequences of length 0 are written as zeros."""
        self._attention.launch(q, kv_cache, batch, scale, softcap, out)

    # logits
    def penalize(
        self, logits_row: Tensor, prompt_ids: Tensor, output_ids: Tensor, repetition: float, presence: float, frequency: float
    ) -> None:
        """See the contract. All tensors on the device."""
        counts = self._scratch.counts
        if repetition != 1.0:
            self._count(prompt_ids, counts, from_prompt=True)
        self._count(output_ids, counts, from_prompt=False)
        vocab = logits_row.shape[0]
        self._launch(
            penalize_kernel, (ceil_div(vocab, ELEMENTWISE_BLOCK),), logits_row, counts, float(repetition), float(presence),
            float(frequency), vocab, BLOCK=ELEMENTWISE_BLOCK, num_warps=ELEMENTWISE_WARPS,
        )  # fmt: skip

    def _count(self, ids: Tensor, counts: Tensor, *, from_prompt: bool) -> None:
        if ids.numel():
            self._launch(
                count_ids_kernel, (ceil_div(ids.numel(), ELEMENTWISE_BLOCK),), ids, counts, ids.numel(), FROM_PROMPT=from_prompt,
                BLOCK=ELEMENTWISE_BLOCK, num_warps=ELEMENTWISE_WARPS,
            )  # fmt: skip

    def sample(self, logits: Tensor, batch: SamplingBatch, out_ids: Tensor) -> None:
        """See the contract. Values tied with the last one kept are kept; the launches depend on R and all_greedy only."""
        rows, vocab = logits.shape
        assert rows <= self.limits.max_num_seqs and vocab <= self.limits.vocab_size, "more than the kernels were made for"
        scratch, stride = self._scratch, logits.stride(0)
        line, chunks = scratch.best_value.stride(0), ceil_div(vocab, SAMPLE_CHUNK)
        padded = next_power_of_2(chunks)
        part_line = scratch.part_best.stride(0)
        self._launch(
            chunk_best_kernel, (rows, chunks), logits, scratch.best_value, scratch.best_id, scratch.part_best, vocab, stride,
            line, part_line, CHUNK=SAMPLE_CHUNK, PART=SAMPLE_PART, num_warps=4,
        )  # fmt: skip
        if not batch.all_greedy:
            parts = ceil_div(vocab, SAMPLE_PART)
            self._launch(
                threshold_kernel, (rows,), logits, scratch.part_best, scratch.active_parts, scratch.threshold, batch.temperature,
                batch.top_k, batch.top_p, batch.min_p, vocab, stride, part_line, parts, PARTS_PAD=next_power_of_2(parts),
                PART=SAMPLE_PART, BLOCK=SEARCH_BLOCK, num_warps=SEARCH_WARPS,
            )  # fmt: skip
            self._launch(
                chunk_sum_kernel, (rows, chunks), logits, scratch.best_value, scratch.threshold, scratch.chunk_sum,
                batch.temperature, vocab, stride, line, chunks, CHUNKS_PAD=padded, CHUNK=SAMPLE_CHUNK, num_warps=4,
            )  # fmt: skip
        self._launch(
            pick_kernel, (rows,), logits, scratch.best_value, scratch.best_id, scratch.threshold, scratch.chunk_sum,
            batch.temperature, batch.seed, batch.position, out_ids, vocab, stride, line, chunks, CHUNKS_PAD=padded,
            CHUNK=SAMPLE_CHUNK, GREEDY=batch.all_greedy, num_warps=4,
        )  # fmt: skip

    def top_logprobs(
        self, logits: Tensor, chosen: Tensor, out_chosen: Tensor, out_rank: Tensor, out_ids: Tensor, out_values: Tensor
    ) -> None:
        """See the contract. Equal values are listed by id; the rank counts strictly larger ones. A place is one pass."""
        rows, vocab = logits.shape
        self._launch(
            top_logprobs_kernel, (rows,), logits, chosen, out_chosen, out_rank, out_ids, out_values, vocab, logits.stride(0),
            out_ids.stride(0), out_values.stride(0), out_ids.shape[1], BLOCK=SEARCH_BLOCK, num_warps=SEARCH_WARPS,
        )  # fmt: skip


def _hopper_launcher(launch: Launch, limits: KernelLimits) -> PrefillLauncher:
    # optional part: imported only where it is chosen
    from brim.kernels.triton.hopper_launch import HopperLauncher

    return HopperLauncher(launch, next_power_of_2(limits.max_num_seqs))


def _hopper_products(launch: Launch, num_cores: int, scratch: Scratch) -> HopperProducts:
    # optional part: imported only where it is chosen
    from brim.kernels.triton.hopper_products import HopperProducts

    return HopperProducts(launch, num_cores, scratch.sums, scratch.part_arrivals, scratch.stats)


def _matrix(weight: LinearWeight) -> Tensor:
    assert isinstance(weight, TorchLinearWeight), "a weight of another backend"
    return weight.storage
