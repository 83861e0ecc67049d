"""Softmax of TE's unfused attention: scaled, masked, float32 inside."""

from __future__ import annotations

import torch
from torch import Tensor


def aligned_causal_softmax(inputs: Tensor, scale: float) -> Tensor:
    """Return the softmax of scores [..., queries, keys]; the last query sees all keys."""
    queries, keys = inputs.shape[-2:]
    later = torch.ones(queries, keys, dtype=torch.bool, device=inputs.device).triu(1 + keys - queries)
    return (inputs.float() * scale).masked_fill(later, float("-inf")).softmax(-1).to(inputs.dtype)


upper_triangular_softmax = aligned_causal_softmax  # for as many queries as keys


def masked_softmax(inputs: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Return the softmax of scores where ``mask`` is not set."""
    return (inputs.float() * scale).masked_fill(mask.bool(), float("-inf")).softmax(-1).to(inputs.dtype)


def softmax_backward(grad: Tensor, output: Tensor, scale: float) -> Tensor:
    """Return the gradient of the scores."""
    dy, y = grad.float(), output.float()
    return (scale * y * (dy - (dy * y).sum(-1, keepdim=True))).to(output.dtype)
