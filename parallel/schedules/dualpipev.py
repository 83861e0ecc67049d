"""DualPipeV: DualPipe folded in the middle, so that every stage lies on one rank."""

from __future__ import annotations

from collections.abc import Iterator

from parallel.errors import ScheduleError
from parallel.pipeline.actions import Placement, Schedule, Step
from parallel.schedules.dual import dual_actions


def dualpipev(ranks: int, microbatches: int) -> Schedule:
    """Microbatches run down the ranks and back: rank r holds stages r and 2P - 1 - r, and overlaps one with the other.

    Largest bubble of a rank: (P - 1)(FB + B - 3W) over P ranks with 2P stages, which is (P'/2 - 1)(FB + B - 3W) where
    P' = 2P counts stages, as the paper's table does. Live microbatches (of half a rank's layers): 2P + 1.
    Source: the DualPipe repository; cut-in-half idea by Sea AI Lab.
    Raises: ScheduleError: fewer than 2P microbatches.
    """
    if microbatches < 2 * ranks:
        raise ScheduleError(
            f"microbatches = {microbatches} is below 2 x pipeline = {2 * ranks}, which dualpipev needs; use {2 * ranks}"
        )
    placement = Placement("v", ranks, 2 * ranks, microbatches)

    def actions(rank: int) -> Iterator[Step]:
        def pass_of(side: int, number: int) -> tuple[int, int]:
            return (2 * ranks - 1 - rank if side else rank), number

        return dual_actions(rank, ranks, microbatches, pass_of)

    return Schedule.from_ranks("dualpipev", placement, actions)
