"""RMSNorm, float32 inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from testing.te.kernels.formats import torch_dtype


def rmsnorm_forward(
    input: Tensor, weight: Tensor, eps: float, ln_out: Any, quantizer: Any, otype: object, sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Any, None, Tensor]:  # fmt: skip
    """Return (output, quantised where a quantizer is given, None, 1 / RMS [rows])."""
    x = input.float()
    inverse = torch.rsqrt(x.pow(2).mean(-1) + eps)
    out = (x * inverse[..., None] * _gain(weight, zero_centered_gamma)).to(torch_dtype(otype))
    if quantizer is not None:
        out = quantizer(out)
    elif ln_out is not None:
        out = ln_out.copy_(out)
    return out, None, inverse


def rmsnorm_backward(
    dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the input and of the gain."""
    normed, grad = x.float() * rsigma[..., None], dz.reshape(x.shape).float()
    weighted = grad * _gain(gamma, zero_centered_gamma)
    dx = rsigma[..., None] * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (grad * normed).sum(0).to(gamma.dtype)


def _gain(weight: Tensor, zero_centered: bool) -> Tensor:
    return weight.float() + (1 if zero_centered else 0)
