"""What a stage holds: the common words of the exact path and of the formulae. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one stage on one rank. All but the parameter counts are above the level without this microbatch.

    ``kept`` lives from the forward to the last gradient; ``kept_deferred`` from an input gradient to its weight
    gradient; ``held`` is there once, whatever the number of microbatches. The peaks are the most that is alive inside a
    pass, what is kept included; ``peak_backward`` is that of a backward overlapped with a forward, less what the
    forward keeps, where the schedule overlaps. ``frozen`` and ``frozen_experts``: of the parameters, and of those of
    experts, how many are not trained.
    """

    parameters: int
    expert_parameters: int
    fp8_parameters: int
    kept: int
    held: int
    kept_deferred: int
    peak_forward: int
    peak_backward: int
    peak_weight_grad: int
    message: int
    frozen: int = 0
    frozen_experts: int = 0
