"""Grouped products of the experts. T tokens sorted by expert; ``ends`` [E] int32: the last row of each, exclusive."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Return [T, O] from x [T, I] and weight [E, I, O]."""
    if x.shape[0] == 0:
        return x.new_zeros((0, weight.shape[-1]))
    return F.grouped_mm(x, weight, offs=ends)
