"""How evenly the experts are used."""

from __future__ import annotations

from torch import Tensor


def max_violation(tokens_per_expert: Tensor) -> Tensor:
    """Return MaxVio of each layer: how far the busiest expert is above the mean load, as a share of the mean.

    Args:
        tokens_per_expert: [..., E] tokens of a batch; leading dimensions are layers.
    Returns: [...] float64; 0 when all experts have the same load.
    Source: arXiv 2408.15664 section 4.1.
    """
    load = tokens_per_expert.double()
    mean = load.mean(-1)
    return (load.amax(-1) - mean) / mean.clamp(min=1e-12)
