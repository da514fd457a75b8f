"""The products of few rows that `cuda_tuning.py` tries: each of a layer with its neighbours, and the logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from cuda_timing import ModelShape, copies_for
from torch import Tensor
from tuning_cases import BF16, BYTES_PER_S, CHIP, Build, Candidate, Case, kernels_on, noise

from brim.kernels.triton.hopper_products import HopperProducts
from brim.kernels.triton.launch import Launch, depending
from brim.kernels.triton.products import ProductLauncher
from brim.kernels.triton.scratch import KernelLimits, Scratch
from brim.kernels.triton.tuning import HOPPER_PRODUCT_TILE, HopperProductTile, ProductTile

VECTOR = "4 1024 4 2 0,4 2048 8 2 0,8 1024 4 2 1024,16 512 8 3 1024"
SKINNY = "16 512 2 3 1024,16 512 2 4 1024,32 256 4 4 1024,16 256 1 4 1024,32 512 4 3 1024"
ROWS = {1: (1, VECTOR), 8: (16, SKINNY), 16: (16, SKINNY)}
HOPPER = "10 4,10 8,10 12,12 8,20 8"


def product_tiles(rows: int) -> list[ProductTile]:
    """Columns, depth, warps, stages, columns asked for ahead."""
    block, text = ROWS[rows]
    numbers = [tuple(map(int, group.split())) for group in text.split(",")]
    return [ProductTile(block, cols, depth, warps, stages, ahead) for cols, depth, warps, stages, ahead in numbers]


def hopper_tiles() -> list[HopperProductTile]:
    """Stages, least share."""
    numbers = [tuple(map(int, group.split())) for group in HOPPER.split(",")]
    return [replace(HOPPER_PRODUCT_TILE, stages=stages, least_share=least) for stages, least in numbers]


def product_cases(shape: ModelShape) -> Iterator[tuple[str, Build]]:
    """Every product of a layer with its neighbours, and the logits, at 1, 8 and 16 rows."""
    for rows in ROWS:
        for name, (cols, depth) in (shape.linears() | {"lm_head": (shape.vocab, shape.hidden)}).items():
            yield (
                f"{name} M={rows}",
                lambda d, launch, n=name, c=cols, k=depth, r=rows: product_case(shape, n, c, k, r, d, launch),
            )


def product_case(shape: ModelShape, name: str, cols: int, depth: int, rows: int, device: str, launch: Launch) -> Case:
    """Today: norm, library product, activation, one after the other. Candidates: one launch, started early."""
    gated, normed, added, wide = name == "gate_up", name in ("qkv", "gate_up"), name in ("o", "down"), name == "lm_head"
    num_bytes = cols * depth * 2
    count = copies_for(num_bytes, most=48)
    case = Case(f"{name} M={rows}", num_bytes / BYTES_PER_S * 1e3)
    kernels = kernels_on(shape, device, launch)
    weights = [kernels.new_linear(cols, depth, BF16) for _ in range(1 if device == "meta" else count)]
    matrices = [weight.storage for weight in weights]  # type: ignore[attr-defined]
    if device != "meta":
        for matrix in matrices:
            matrix.normal_(0, depth**-0.5)
    x, norm, eps = noise(device, rows, depth), torch.ones(depth, device=device), 1e-6
    out = torch.empty(rows, cols // 2 if gated else cols, dtype=torch.float32 if wide else BF16, device=device)
    middle, residual, hidden = noise(device, rows, cols), noise(device, rows, depth), noise(device, rows, depth)

    def today(weight: Any) -> None:
        if normed:
            kernels.add_rms_norm(x, residual, norm, eps, hidden)
        kernels.linear(hidden if normed else x, weight, middle if gated else out)
        if gated:
            kernels.gated_activation(middle, out, "silu")

    case.candidates.append(Candidate("today", [lambda w=w: today(w) for w in weights], is_today=True))
    case.expected = product_reference(x, matrices[0], eps, normed=normed, gated=gated) if device != "meta" else None
    folded = normed and rows == 1
    options: dict[str, Any] = {"norm": norm, "eps": eps} if folded else {}
    options |= {"activation": "silu"} if gated else {"added": added}
    run = ProductLauncher(depending(launch)).launch

    def by_skinny(weight: Tensor, tile: ProductTile) -> None:
        if normed and not folded:
            kernels.rms_norm(x, norm, eps, hidden)
        run(hidden if normed and not folded else x, weight, out, tile, **options)

    for tile in product_tiles(rows):
        if tile.depth > 2 * depth or (tile.ahead and tile.rows == 1 and tile.depth >= depth):
            continue
        calls = [lambda m=m, t=tile: by_skinny(m, t) for m in matrices]
        case.candidates.append(Candidate(f"{tile.cols}x{tile.depth} w{tile.warps} s{tile.stages} a{tile.ahead}", calls, out))
        case.candidates[-1].setting = tile
    limits = KernelLimits(256, shape.heads, shape.kv_heads, shape.head_dim, 16)
    scratch = Scratch(limits, CHIP.num_cores, torch.device(device))
    for tile in hopper_tiles():
        products = HopperProducts(depending(launch), CHIP.num_cores, scratch.sums, scratch.part_arrivals, tile)
        if rows == 1 or normed or gated or not products.suits(x, matrices[0], out):
            continue
        calls = [lambda m=m, p=products: p.launch(x, m, out) for m in matrices]
        case.candidates.append(Candidate(f"hopper s{tile.stages} l{tile.least_share}", calls, out, setting=tile))
    return case


def product_reference(x: Tensor, matrix: Tensor, eps: float, *, normed: bool, gated: bool) -> Tensor:
    """In float32 from the rounded inputs."""
    rows = x.float()
    if normed:
        rows = (rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps)).to(BF16).float()
    product = rows @ matrix.float().t()
    gate, up = product.chunk(2, dim=1) if gated else (product, product)
    return torch.nn.functional.silu(gate) * up if gated else product
