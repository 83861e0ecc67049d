"""Interleaved 1F1B: several smaller stages a rank."""

from __future__ import annotations

from collections.abc import Iterator

from parallel.errors import ScheduleError
from parallel.pipeline.actions import Action, Placement, Schedule, backward, forward


def interleaved(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """Each rank holds ``chunks`` stages r, r + P, ...; rounds of P microbatches pass one chunk, then the next.

    Bubble of a rank: (P - 1)(F + B) / v, with F and B of the rank's whole share. Live microbatches: more than 1F1B's
    by the factor 1 + (P - 1) / (P v).
    Source: arXiv 2104.04473 section 2.2.
    Raises: ScheduleError: P does not divide the microbatches.
    """
    if microbatches % ranks:
        near = max(ranks, round(microbatches / ranks) * ranks)
        raise ScheduleError(
            f"microbatches = {microbatches} is not a multiple of pipeline = {ranks}, whose ranks work in rounds under "
            f"interleaved; use {near}"
        )
    placement = Placement("loop", ranks, ranks * chunks, microbatches)
    total = microbatches * chunks

    def place(index: int, first_chunk: int, step: int) -> tuple[int, int]:
        """Return (chunk, microbatch) of the index-th forward or backward of a rank."""
        round_, within = divmod(index, ranks * chunks)
        chunk, microbatch = divmod(within, ranks)
        return first_chunk + step * chunk, round_ * ranks + microbatch

    def actions(rank: int) -> Iterator[Action]:
        def f(index: int) -> Action:
            chunk, microbatch = place(index, 0, 1)
            return forward(chunk * ranks + rank, microbatch)

        def b(index: int) -> Action:
            chunk, microbatch = place(index, chunks - 1, -1)
            return backward(chunk * ranks + rank, microbatch)

        warmup = min(2 * (ranks - 1 - rank) + (chunks - 1) * ranks, total)
        yield from (f(i) for i in range(warmup))
        for i in range(total - warmup):
            yield f(warmup + i)
            yield b(i)
        yield from (b(i) for i in range(total - warmup, total))

    return Schedule.from_ranks("interleaved", placement, actions)
