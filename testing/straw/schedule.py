"""A schedule without most of its microbatches: every kind of action stays, and the order of what is left."""

from __future__ import annotations

from parallel.pipeline.actions import Action, Overlap, Schedule, Step


def cut(schedule: Schedule, rank: int, pairs: int = 2) -> Schedule:
    """Return the schedule with the microbatches that meet in the first overlapped pairs of ``rank``, ``pairs`` pairs of
    different forward stages; the first and the last microbatch where it overlaps nothing."""
    kept: set[int] = set()
    stages: list[int] = []
    for step in schedule.ranks[rank]:
        if isinstance(step, Overlap) and len(stages) < pairs and step.forward.stage not in stages:
            stages.append(step.forward.stage)
            kept |= {step.forward.microbatch, step.backward.microbatch}
    kept = kept or {0, schedule.microbatches - 1}
    ranks = tuple(tuple(left for step in steps if (left := _left(step, kept))) for steps in schedule.ranks)
    return Schedule(schedule.name, schedule.placement, ranks)


def _left(step: Step, kept: set[int]) -> Step | None:
    """Return what is left of a step; a pair of which one pass goes is the other pass alone."""
    left: list[Action] = [part for part in step.parts if part.microbatch in kept]
    return step if len(left) == len(step.parts) else left[0] if left else None
