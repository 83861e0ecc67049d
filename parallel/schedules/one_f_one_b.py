"""1F1B: one forward, one backward."""

from __future__ import annotations

from collections.abc import Iterator

from parallel.pipeline.actions import Action, Placement, Schedule, backward, forward


def one_f_one_b(ranks: int, microbatches: int) -> Schedule:
    """Each rank fills the pipeline, then alternates forward and backward.

    Bubble of a rank: (P - 1)(F + B). Live microbatches: P - r on rank r, at most P.
    Source: PipeDream-Flush, arXiv 2006.09503; Megatron-LM, arXiv 2104.04473 section 2.2.
    """

    def actions(rank: int) -> Iterator[Action]:
        warmup = min(ranks - 1 - rank, microbatches)
        yield from (forward(rank, m) for m in range(warmup))
        for m in range(microbatches - warmup):
            yield forward(rank, warmup + m)
            yield backward(rank, m)
        yield from (backward(rank, m) for m in range(microbatches - warmup, microbatches))

    return Schedule.from_ranks("1f1b", Placement("loop", ranks, ranks, microbatches), actions)
