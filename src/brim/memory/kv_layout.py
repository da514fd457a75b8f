"""How KV memory is laid out. Owns KV groups, bytes per block and the split of a byte budget into blocks. Torch-free.

A group is a set of layers with one attention kind; its block holds `block_size` tokens of all its layers, block-major:
`[blocks, layers, K/V, block_size, kv_heads, head_dim]`, so a block is one contiguous run of bytes. Full-attention layers
hold the whole context; sliding layers only their window, in a group of their own whose block has its own byte size:
nothing is padded to the largest.
"""

from __future__ import annotations

from dataclasses import dataclass

from brim.config.model_spec import AttentionKind, ModelSpec
from brim.units import ceil_div


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that share block tables. `layers` are model layer indices in order; window 0 means full attention."""

    kind: AttentionKind
    layers: tuple[int, ...]
    window: int
    block_bytes: int

    def blocks_for(self, num_tokens: int, block_size: int, step_tokens: int) -> int:
        """Most blocks one sequence of num_tokens can hold at once when a step adds at most step_tokens to it.

        A sliding group keeps the blocks that the window of the oldest new token touches: window - 1 + step_tokens
        positions that may start anywhere in a block, so one block more. Example: window 512, block 16, step 1:
        ceil(512 / 16) + 1 = 33 blocks however long the sequence.
        """
        whole = ceil_div(num_tokens, block_size)
        if not self.window:
            return whole
        return min(whole, ceil_div(self.window - 1 + step_tokens, block_size) + 1)


@dataclass(frozen=True, slots=True)
class KVLayout:
    """All groups of a model at one block size and element size. The first group is full attention where there is one."""

    groups: tuple[KVGroup, ...]
    block_size: int
    num_kv_heads: int
    head_dim: int
    element_bytes: int

    @staticmethod
    def of(spec: ModelSpec, block_size: int, element_bytes: int) -> KVLayout:
        """Groups by attention kind, full first. A block of one layer is 2 * block_size * kv_heads * head_dim elements."""
        layer_bytes = 2 * block_size * spec.num_kv_heads * spec.head_dim * element_bytes
        groups = []
        for kind, window in (("full", 0), ("sliding", spec.sliding_window)):
            layers = tuple(i for i, k in enumerate(spec.layer_kinds) if k == kind)
            if layers:
                groups.append(KVGroup(spec.layer_kinds[layers[0]], layers, window, len(layers) * layer_bytes))
        return KVLayout(tuple(groups), block_size, spec.num_kv_heads, spec.head_dim, element_bytes)

    @property
    def token_bytes(self) -> int:
        """KV bytes of one token over all layers, sliding ones included."""
        return sum(group.block_bytes for group in self.groups) // self.block_size

    def bytes_for(self, blocks: tuple[int, ...]) -> int:
        """Bytes of `blocks[g]` blocks in each group."""
        return sum(n * group.block_bytes for n, group in zip(blocks, self.groups, strict=True))

    def sliding_cap_blocks(self, group: KVGroup, max_num_seqs: int, max_step_tokens: int) -> int:
        """Blocks of a sliding group that no workload can exceed: each sequence's window plus one step's tokens in all."""
        per_seq = group.blocks_for(1 << 40, self.block_size, 1)
        return max_num_seqs * (per_seq + 1) + ceil_div(max_step_tokens, self.block_size)

    def blocks_for_tokens(self, num_tokens: int, max_num_seqs: int, max_step_tokens: int) -> tuple[int, ...]:
        """Blocks of each group when the full groups hold num_tokens: a sliding group gets as many, but never more than its
        cap, so it is never what stops a request that the full group could hold."""
        whole = ceil_div(num_tokens, self.block_size)
        return tuple(
            min(whole, self.sliding_cap_blocks(g, max_num_seqs, max_step_tokens)) if g.window else whole for g in self.groups
        )

    def blocks_for_budget(self, num_bytes: int, max_num_seqs: int, max_step_tokens: int) -> tuple[int, ...]:
        """The most blocks whose bytes stay within num_bytes, by the split of `blocks_for_tokens` (monotone: bisection).

        Every group also keeps one block (id 0) that the engine never hands out; it is inside these counts.
        """
        low, high = 0, num_bytes // min(g.block_bytes for g in self.groups) + 1
        if not any(g.window == 0 for g in self.groups):
            high = min(high, max(self.sliding_cap_blocks(g, max_num_seqs, max_step_tokens) for g in self.groups))
        while low < high:
            middle = (low + high + 1) // 2
            blocks = self.blocks_for_tokens(middle * self.block_size, max_num_seqs, max_step_tokens)
            low, high = (middle, high) if self.bytes_for(blocks) <= num_bytes else (low, middle - 1)
        return self.blocks_for_tokens(low * self.block_size, max_num_seqs, max_step_tokens)

    def tokens_in(self, blocks: tuple[int, ...]) -> int:
        """The KV size in tokens as users count it: what the first group holds."""
        return blocks[0] * self.block_size
