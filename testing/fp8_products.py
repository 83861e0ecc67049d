"""The three products of a layer in FP8, one after the other, as a step takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv3_megatron.precision.products import Fp8Products


def three_products(
    fp8: Fp8Products, x: Tensor, w: Tensor, dy: Tensor, ends: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Y, dX and dW of a layer; ``ends``: where each expert's rows end, for a layer of experts."""
    y, kept_x = fp8.forward(x, w, ends)
    dx, kept_dy = fp8.input_gradient(dy, w, ends)
    return y, dx, weight_gradient(fp8, w, kept_dy, fp8.operand_for_weight_gradient(kept_x, ends), ends)


def weight_gradient(fp8: Fp8Products, w: Tensor, kept_dy: Any, kept_x: Any, ends: Tensor | None = None) -> Tensor:
    """Return dW from what forward and input gradient have kept."""
    total = torch.zeros(w.shape)
    rows = None if ends is None else ends.diff(prepend=ends.new_zeros(1)).tolist()
    fp8.add_weight_gradient(total, kept_dy, kept_x, ends, rows)
    return total
