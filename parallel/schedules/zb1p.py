"""ZB1P: 1F1B whose weight gradients fill the drain."""

from __future__ import annotations

from collections.abc import Iterator

from parallel.pipeline.actions import Action, Placement, Schedule, forward, input_gradient, weight_gradient


def zb1p(ranks: int, microbatches: int) -> Schedule:
    """1F1B with every backward split: input gradients go on at once, weight gradients when there is nothing better.

    Rank r lets a weight gradient trail its input gradient by r microbatches, so that every rank holds as many
    microbatches as rank 0 does under 1F1B.
    Bubble of a rank: (P - 1)(F + B - 2W), B the whole backward. Live microbatches: P.
    Source: ZB-H1 of arXiv 2401.10241; called ZB1P in arXiv 2412.19437, table 2.
    """

    def actions(rank: int) -> Iterator[Action]:
        warmup = min(ranks - 1 - rank, microbatches)
        yield from (forward(rank, m) for m in range(warmup))
        for m in range(microbatches):
            if warmup + m < microbatches:
                yield forward(rank, warmup + m)
            yield input_gradient(rank, m)
            if m >= rank:
                yield weight_gradient(rank, m - rank)
        yield from (weight_gradient(rank, m) for m in range(max(0, microbatches - rank), microbatches))

    return Schedule.from_ranks("zb1p", Placement("loop", ranks, ranks, microbatches), actions)
