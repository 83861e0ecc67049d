"""What a schedule would be if it overlapped forwards with backwards, as megatron-core's interleaved 1F1B can.

Our engine overlaps under DualPipe and DualPipeV; this is for the question what another framework's run, or ours with
such a schedule, would take.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from parallel.pipeline.actions import Overlap, Schedule, Step


def paired(schedule: Schedule) -> Schedule:
    """Return the schedule with every backward of its steady phase beside a forward; itself where some already are.

    The forward that came just before the first backward runs by itself, and the next one beside it, so that the two of
    a pair belong to different microbatches even on the last stage; one microbatch more is live. Passes of one kind keep
    their order.
    Source: megatron-core's combined 1F1B (``overlap_moe_expert_parallel_comm``), which adds that forward too.
    """
    if schedule.kinds - {"F", "B"}:
        return schedule
    return Schedule(schedule.name, schedule.placement, tuple(tuple(_paired(steps)) for steps in schedule.ranks))


def _paired(steps: Sequence[Step]) -> Iterator[Step]:
    forwards = [step for step in steps if step.kind == "F"]
    backwards = [step for step in steps if step.kind == "B"]
    ahead = next(i for i, step in enumerate(steps) if step.kind == "B")
    yield from forwards[:ahead]
    beside = forwards[ahead:]
    for f, b in zip(beside, backwards):
        yield Overlap(f, b)
    yield from backwards[len(beside) :]
