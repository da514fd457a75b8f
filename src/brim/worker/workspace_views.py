"""Where a step's buffers lie in the workspace. Owns the views; `memory.workspace` planned the places."""

from __future__ import annotations

import torch
from torch import Tensor

from brim.memory.workspace import WorkspacePlan
from brim.models.base import Model


def logits_view(vocab_size: int, rows: int, plan: WorkspacePlan, workspace: Tensor) -> Tensor:
    """float32 [rows, vocab_size] in the workspace (uint8)."""
    start = plan.offsets_bytes["logits"]
    return workspace[start : start + 4 * rows * vocab_size].view(torch.float32).view(rows, vocab_size)


def buffer_views(model: Model, max_tokens: int, plan: WorkspacePlan, workspace: Tensor) -> dict[str, Tensor]:
    """The model's buffers by name, each [max_tokens, width], in the workspace (uint8)."""
    views = {}
    for shape in model.buffer_shapes():
        start = plan.offsets_bytes[shape.name]
        flat = workspace[start : start + max_tokens * shape.width * shape.dtype.itemsize]
        views[shape.name] = flat.view(shape.dtype).view(max_tokens, shape.width)
    return views
