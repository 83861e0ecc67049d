"""Evaluation: forwards only."""

from __future__ import annotations

from parallel.pipeline.actions import Action, Placement, Schedule


def forward_only(placement: Placement, name: str = "forward") -> Schedule:
    """Return the schedule that only evaluates: every microbatch through every stage, nothing kept for a backward."""
    ranks: list[list[tuple[int, Action]]] = [[] for _ in range(placement.ranks)]
    per_rank = max(1, placement.stages // placement.ranks)
    for microbatch in range(placement.microbatches):
        for stage in range(placement.stages):
            # Later stages of a microbatch come later, microbatches of a rank's stages take turns: no circle of waiting.
            turn = microbatch * per_rank + stage
            ranks[placement.rank_of(stage, microbatch)].append((turn, Action("F", stage, microbatch)))
    ordered = (tuple(a for _, a in sorted(rank, key=lambda e: (e[0], e[1].microbatch, e[1].stage))) for rank in ranks)
    return Schedule(name, placement, tuple(ordered))
