"""How a product adds up: in float32, or as a tensor core does that keeps about 14 bits.

Hopper's FP8 products align 32 addends to the largest exponent among them and the running sum and keep 13 fraction bits
(arXiv 2412.19437 section 3.3.2; arXiv 2505.09343 section 3.1.1). Adding every 128 products to a float32 sum
("promotion") bounds the loss. Here each group of 32 is added in float32 and then cut, which is the least that such a
unit loses. For studying: many times slower than float32.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Accumulation = Literal["fp32", "14bit", "14bit_promoted"]
_GROUP, _PROMOTE, _FRACTION_BITS = 32, 128, 13


def matmul(a: Tensor, b: Tensor, accumulation: Accumulation = "fp32") -> Tensor:
    """Return a [M, K] times b [K, N], float32, summed over K as ``accumulation`` says."""
    if accumulation == "fp32":
        return a @ b
    total = a.new_zeros((a.shape[0], b.shape[1]))
    running = torch.zeros_like(total)
    for start in range(0, a.shape[1], _GROUP):
        part = a[:, start : start + _GROUP] @ b[start : start + _GROUP]
        largest = a[:, start : start + _GROUP].abs().amax(1, keepdim=True) * b[start : start + _GROUP].abs().amax(0)
        running = _truncate(running, part, torch.maximum(largest, running.abs()))
        if accumulation == "14bit_promoted" and (start + _GROUP) % _PROMOTE == 0:
            total, running = total + running, torch.zeros_like(running)
    return total + running


def _truncate(running: Tensor, part: Tensor, largest: Tensor) -> Tensor:
    """Return running + part with 13 fraction bits below the exponent of ``largest``, cut towards zero."""
    exponent = torch.frexp(largest.clamp(min=torch.finfo(torch.float32).tiny)).exponent - 1
    step = torch.ldexp(torch.ones_like(largest), exponent - _FRACTION_BITS)
    return ((running / step).trunc() + (part / step).trunc()) * step
