"""Grouped products of the experts. T tokens sorted by expert; ``ends`` [E] int32: the last row of each, exclusive."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Return [T, O] from x [T, I] and weight [E, I, O]."""
    if x.shape[0] == 0:
        return x.new_zeros((0, weight.shape[-1]))
    return F.grouped_mm(x, weight, offs=ends)


def grouped_weight_gradient(x: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    """Return [E, O, I] from x [T, I] and the output's gradient [T, O]: one outer product per expert."""
    if x.shape[0] == 0:
        return x.new_zeros((ends.numel(), grad.shape[-1], x.shape[-1]))
    return F.grouped_mm(grad.t(), x, offs=ends)
