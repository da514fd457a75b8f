"""Fixed launch choices per class of shape, never searched at start-up. Owns block sizes, warps and stages.

Each choice has run on an NVIDIA H100 (benchmarks/results); benchmarks/cuda_tuning.py times others. A choice depends only on
what is known when a graph is captured (head sizes, element size, bounds of the batch), never on the lengths inside it.

An indirect load (block table, then tile) takes pipeline stages two at a time: 3, 5 and 7 hold one, two and three tiles ahead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """Tile of an attention kernel: rows are packed (query, head of the group) pairs, keys are cache positions."""

    rows: int
    keys: int
    warps: int
    stages: int


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is at least value: 80 -> 128, 1 -> 1."""
    return 1 << max(0, value - 1).bit_length()


def decode_tile(head_dim: int, group: int, element_bytes: int) -> AttentionTile:
    """Tile of split-KV decode attention for one query per sequence and `group` heads per KV head."""
    rows = max(16, next_power_of_2(group))
    width = next_power_of_2(head_dim)
    if element_bytes == 4:
        return AttentionTile(rows, 16 if width > 128 else 32, 4, 2)
    if width > 128:
        return AttentionTile(rows, 32, 4, 3)
    return replace(DECODE_TILE, rows=rows)


DECODE_TILE = AttentionTile(16, 16, 2, 5)
DECODE_PROGRAMS_PER_CORE = 4


def prefill_tile(head_dim: int, group: int, element_bytes: int, max_query_len: int) -> AttentionTile:
    """Tile of prefill attention. Three classes by the packed rows of the longest query: 16, 64 and more."""
    width = next_power_of_2(head_dim)
    least = max(16, next_power_of_2(group))
    packed = max_query_len * group
    if element_bytes == 4:
        return AttentionTile(max(16 if width > 128 else 32, least), 16 if width > 128 else 32, 4, 2)
    if packed <= 16:
        return AttentionTile(max(16, least), 64 if width <= 128 else 32, 4, 3)
    if packed <= 64 or width > 128:
        return AttentionTile(max(64, least), 64 if width <= 128 else 32, 4, 3)
    return replace(PREFILL_TILE, rows=max(PREFILL_TILE.rows, least))


PREFILL_TILE = AttentionTile(128, 64, 8, 3)
CHUNK_TOKENS = 512  # steps of at most so many take chunk attention,
CHUNK_ROWS = 64  # and larger ones whose sequences all have at most so many packed rows
CHUNK_ELEMENTS = 128 * 128  # float32 values of the parts of all its programs on a core
HOPPER_TILE = AttentionTile(128, 128, 4, 2)  # of `hopper_attention`: warps of each of its two groups


def chunk_tile(head_dim: int, group: int, element_bytes: int, max_query_len: int, *, deep: bool) -> AttentionTile:
    """Tile of chunk attention: as for prompts. deep: with more tiles ahead, for its contexts are long and its programs few; they
    take 129 KiB of shared memory, which not every chip has."""
    tile = prefill_tile(head_dim, group, element_bytes, max_query_len)
    fits = element_bytes == 2 and next_power_of_2(head_dim) <= 128 and tile.rows >= 64
    return replace(tile, stages=5) if deep and fits else tile


def chunk_programs_per_core(rows: int, head_dim: int) -> int:
    """Programs of chunk attention; 0 where its parts would take more memory than is kept for them."""
    if rows >= 64:
        return int(rows * next_power_of_2(head_dim) <= CHUNK_ELEMENTS)
    return min(4, CHUNK_ELEMENTS // (rows * next_power_of_2(head_dim)))


def norm_warps(width: int) -> int:
    """Warps for one row of `width` elements held in registers."""
    return 1 if width <= 256 else 2 if width <= 512 else 4 if width <= 2048 else 8 if width <= 8192 else 16


ELEMENTWISE_BLOCK = 1024
ELEMENTWISE_WARPS = 4

ROPE_SMALL_TOKENS = 64  # up to so many tokens a program takes one head each, so that a small batch fills the chip


def rope_heads(num_tokens: int) -> int:
    """Heads one program of rope_and_cache handles; two classes of T."""
    return 1 if num_tokens <= ROPE_SMALL_TOKENS else 8


SAMPLE_CHUNK = 4096  # ids one program reduces
SAMPLE_PART = 256  # ids whose best value is kept, so that searches skip them together
SEARCH_BLOCK = 4096
SEARCH_WARPS = 16
TOKEN_BLOCK = 128  # ids one program moves
TABLE_NEAR, TABLE_FAR, TABLE_WARPS = 128, 1024, 4  # entries of a block table a program asks the host for at once


@dataclass(frozen=True, slots=True)
class ProductTile:
    """Tile of a skinny product. rows 1: no matrix units. ahead: columns of the weights asked for before the wait."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    ahead: int


FEW_ROWS = 16  # the most rows that our own products are faster for


def product_tile(num_rows: int, cols: int, depth: int, *, gated: bool, element_bytes: int = 2) -> ProductTile:
    """Tile of num_rows x depth @ depth x cols, num_rows one or few; gated: two such products at once."""
    if num_rows == 1:
        tile = PRODUCT_TILES["one gated" if gated else "one"]
    else:
        tile = PRODUCT_TILES["gated" if gated else "narrow" if cols <= _NARROW_COLS else "few"]
    shrink = element_bytes // 2
    width = max(16, min(tile.depth // shrink, next_power_of_2(depth)))
    warps = max(1, tile.warps * width // tile.depth)
    return replace(
        tile, depth=width, warps=warps, ahead=min(tile.ahead, depth), cols=min(tile.cols, max(16, next_power_of_2(cols)))
    )


_NARROW_COLS = 4096  # up to here all programs run at once, one or two a multiprocessor, and deeper pipelines pay
PRODUCT_TILES = {
    "one": ProductTile(1, 4, 2048, 8, 2, 0),
    "one gated": ProductTile(1, 4, 1024, 4, 2, 0),
    "narrow": ProductTile(16, 16, 512, 2, 4, 1024),
    "few": ProductTile(16, 16, 512, 2, 3, 1024),
    "gated": ProductTile(16, 32, 256, 4, 4, 1024),
}


@dataclass(frozen=True, slots=True)
class HopperProductTile:
    """How `hopper_product` cuts a product. least_share: pieces a program takes at least. together: parts of a column block that
    are loaded at once. registers: of a thread at launch."""

    stages: int
    least_share: int
    together: int
    registers: int


HOPPER_PRODUCT_TILE = HopperProductTile(10, 8, 8, 72)
