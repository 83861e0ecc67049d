"""How evenly the experts are used."""

from __future__ import annotations

import torch
from torch import Tensor

RUNNING = 0.99  # the loads of about the last hundred steps, over which the paper of loss-free balancing smooths too


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


class RunningLoads:
    """Loads averaged over the last steps, each step's share of tokens fading by 1% a step.

    MaxVio of a batch mixes imbalance with chance; of the running loads only what persists is left. Begins anew in a
    resumed run: it is a measure, not a state.
    """

    def __init__(self) -> None:
        self._loads: Tensor | None = None

    def update(self, loads: Tensor) -> Tensor:
        """Add a step's loads [..., E] and return the running ones, in shares of the layer's tokens."""
        shares = loads.double() / loads.double().sum(-1, keepdim=True).clamp(min=1)
        self._loads = shares if self._loads is None else torch.lerp(shares, self._loads, RUNNING)
        return self._loads
