"""A run's health: steps that are not taken, and a stop that all ranks agree on.

A step whose loss or gradient norm is not finite, or lies far above the recent ones, is skipped: weights, moments and
router biases stay, its tokens count as consumed. The rule for "far" is OLMo-core's SkipStepOptimizer: more than six
standard deviations above the mean of the last 128 steps, once half of them are there. The window is part of the
progress that checkpoints hold, so that a resumed run decides as the undisturbed one would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from dsv3_megatron.health.settings import HealthSettings


@dataclass
class HealthState:
    """What is remembered of recent steps; plain numbers, kept in checkpoints."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    skipped_in_row: int = 0
    rollbacks: int = 0


class StepGuard:
    """Decides whether a step is taken, from numbers that are the same on all ranks."""

    def __init__(self, settings: HealthSettings, state: HealthState):
        self.settings, self.state = settings, state
        self.reason: str | None = None  # why the last step was skipped

    def allows(self, loss: float, norm: float) -> bool:
        """Return whether to take a step of this loss and gradient norm, and remember both."""
        state = self.state
        self.reason = self._objection(loss, norm)
        if math.isfinite(loss) and math.isfinite(norm):
            state.losses = [*state.losses, loss][-self.settings.skip_window :]
            state.norms = [*state.norms, norm][-self.settings.skip_window :]
        state.skipped_in_row = state.skipped_in_row + 1 if self.reason else 0
        return self.reason is None

    @property
    def exhausted(self) -> bool:
        """Whether as many steps were skipped in a row as may be."""
        return self.state.skipped_in_row >= self.settings.skip_limit

    def _objection(self, loss: float, norm: float) -> str | None:
        named = (("loss", loss, self.state.losses), ("gradient norm", norm, self.state.norms))
        for name, value, _ in named:
            if not math.isfinite(value):
                return f"{name} is {value}"
        sigma, least = self.settings.skip_sigma, max(2, self.settings.skip_window // 2)
        if sigma is None or len(self.state.losses) < least:
            return None
        for name, value, recent in named:
            mean, deviation = float(np.mean(recent)), float(np.std(recent, ddof=1))
            if value - mean > sigma * deviation:
                return f"{name} {value:.4g} is {(value - mean) / max(deviation, 1e-12):.1f} deviations above {mean:.4g}"
        return None


def nonfinite_gradients(parameters: dict[str, torch.nn.Parameter], most: int = 3) -> list[str]:
    """Return, on every rank, names of parameters whose gradient is not finite, of all ranks, ``most`` at most."""
    gradients = {name: getattr(p, "main_grad", None) for name, p in parameters.items()}
    mine = [name for name, grad in gradients.items() if grad is not None and not torch.isfinite(grad).all()]
    found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, mine[:most])
    return list(dict.fromkeys(name for names in found for name in names))[:most]


def stop_agreed(wanted: bool, device: torch.device, flags: Sequence[int] = ()) -> list[int]:
    """Return whether any rank was asked to stop (1 or 0), then each of ``flags``: the largest over all ranks."""
    agreed = torch.tensor([int(wanted), *flags], device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    return agreed.tolist()
