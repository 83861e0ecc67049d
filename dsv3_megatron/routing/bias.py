"""Auxiliary-loss-free balancing: the router's expert bias after one step."""

from __future__ import annotations

import torch
from torch import Tensor


def update_expert_bias(bias: Tensor, tokens_per_expert: Tensor, *, speed: float) -> Tensor:
    """Return the router's expert bias after one step of auxiliary-loss-free balancing.

    An expert above the mean load of the global batch becomes less attractive by ``speed``, one below it more
    attractive; one exactly at the mean keeps its bias. The bias steers selection only and never scales an output.

    Args:
        bias: [..., E] float32, in units of affinity (sigmoid output, 0 to 1); leading dimensions are layers.
        tokens_per_expert: [..., E], tokens sent to each expert in the whole step: already summed over microbatches
            and over every rank that routes tokens of this layer.
        speed: the paper's gamma, affinity per step, >= 0; 0.0 freezes the bias.
    Returns: [..., E] float32, a new tensor.
    Raises: ValueError: the shapes differ or ``speed`` is negative.
    Source: arXiv 2412.19437 section 2.1.2; sign rule of arXiv 2408.15664, Algorithm 1.
    """
    if bias.shape != tokens_per_expert.shape or speed < 0:
        raise ValueError(f"bias {tuple(bias.shape)}, loads {tuple(tokens_per_expert.shape)}, speed {speed}")
    load = tokens_per_expert.double()
    return bias + speed * torch.sign(load.mean(-1, keepdim=True) - load).to(bias.dtype)
