"""Which ranks of a pipeline exchange messages, and in which order they connect before the first one.

Under NCCL the first message of two ranks creates their communicator, and the first one in each direction connects its
transport: both calls hold the host until the other rank calls too. Left to the schedule's own messages, ranks can wait
for each other in a circle: under ``interleaved`` rank 0 posts a receive from rank P - 1 before its first forward. So
every pair connects once, ahead, in rounds in which each rank has one partner at most. No round waits for a later one,
which rules a circle out, and there are three rounds at most, however many ranks.

(torch 2.13, ProcessGroupNCCL::pointToPoint without device_id; NCCL 2.30, p2pTaskAppend and ncclTransportP2pSetup.)
"""

from __future__ import annotations

from collections.abc import Iterable

from parallel.pipeline.actions import Placement

Pair = tuple[int, int]


def pairs_of(placement: Placement) -> tuple[Pair, ...]:
    """Return the pairs of ranks (lower, higher) that hold neighbouring stages, whatever runs over them."""
    microbatches = {0, placement.microbatches - 1}  # of both directions
    neighbours = (
        (placement.rank_of(stage, microbatch), placement.rank_of(stage + 1, microbatch))
        for microbatch in microbatches
        for stage in range(placement.stages - 1)
    )
    return tuple(sorted({(min(pair), max(pair)) for pair in neighbours if pair[0] != pair[1]}))


def connection_rounds(pairs: Iterable[Pair]) -> tuple[tuple[Pair, ...], ...]:
    """Return the pairs in rounds in which every rank appears once at most."""
    rounds: list[list[Pair]] = []
    for pair in sorted(pairs):
        free = (of for of in rounds if not any(set(pair) & set(other) for other in of))
        if (chosen := next(free, None)) is None:
            rounds.append(chosen := [])
        chosen.append(pair)
    return tuple(map(tuple, rounds))


def connection_order(placement: Placement) -> tuple[tuple[int, ...], ...]:
    """Return, per rank, the peers it connects with, in order."""
    rounds = connection_rounds(pairs_of(placement))
    return tuple(
        tuple(sum(pair) - rank for pairs in rounds for pair in pairs if rank in pair) for rank in range(placement.ranks)
    )
