"""DualPipe: microbatches enter from both ends of the pipeline."""

from __future__ import annotations

from collections.abc import Iterator

from parallel.errors import ScheduleError
from parallel.pipeline.actions import Placement, Schedule, Step
from parallel.schedules.dual import dual_actions


def dualpipe(ranks: int, microbatches: int) -> Schedule:
    """Half of the microbatches run down the ranks, half up; a forward of one overlaps a backward of the other.

    Every stage lies on two ranks, s and P - 1 - s: twice the parameters of 1F1B (the experts' share of which a large
    EP makes small). Microbatches 0 to n/2 - 1 enter at rank 0, the others at rank P - 1.
    Largest bubble of a rank: (P/2 - 1)(FB + B - 3W). Live microbatches: P + 1.
    Source: arXiv 2412.19437 section 3.2.1 and table 2.
    Raises: ScheduleError: odd ranks or microbatches, or fewer than 2P microbatches.
    """
    if ranks % 2:
        raise ScheduleError(f"pipeline = {ranks} is odd, but dualpipe pairs ranks; use {ranks - 1 or 2} or {ranks + 1}")
    if microbatches % 2 or microbatches < 2 * ranks:
        near = max(2 * ranks, microbatches + microbatches % 2)
        why = (
            "is odd, but half of them enter at each end" if microbatches % 2 else f"is below 2 x pipeline = {2 * ranks}"
        )
        raise ScheduleError(f"microbatches = {microbatches} {why} under dualpipe; use {near}")
    placement = Placement("mirror", ranks, ranks, microbatches)
    half, per_side = ranks // 2, microbatches // 2

    def actions(rank: int) -> Iterator[Step]:
        far_half = rank >= half

        def pass_of(side: int, number: int) -> tuple[int, int]:
            direction = side ^ far_half  # side 0 of a rank in the far half entered at the last rank
            stage = ranks - 1 - rank if direction else rank
            return stage, number + direction * per_side

        return dual_actions(min(rank, ranks - 1 - rank), half, per_side, pass_of)

    return Schedule.from_ranks("dualpipe", placement, actions)
