"""Where ranks run, and who keeps whose copy: found out once, when a run starts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from dsv3_megatron.checkpoint.memory.placement import peers_of
from parallel.agree import agreed, gathered
from parallel.world import host_name

# For one message of the other end, which may still be writing its share; blocks of a share then come in a fraction of a
# second. Where a connection is lost, ranks that it is no concern of wait for those that it is.
LONGEST_WAIT = timedelta(minutes=5)


@dataclass(frozen=True)
class Places:
    """What a rank knows of the nodes.

    Attributes:
        group: all ranks, over gloo; what carries shares, and nothing else.
        host: of this rank.
        is_leader: whether this is the first rank of its host, which makes and removes folders there.
        ranks_here: the ranks of the host.
        keeper: who keeps the copy of this rank's share; None where nobody does.
        kept: whose copy this rank keeps; None likewise.
        apart: what never holds both copies (:class:`placement.Peers`).
        hosts: of every rank; on rank 0, elsewhere empty.
    """

    group: dist.ProcessGroup
    host: str
    is_leader: bool
    ranks_here: tuple[int, ...]
    keeper: int | None
    kept: int | None
    apart: str
    hosts: tuple[str, ...] = field(default=())


def find_places(racks: Sequence[str]) -> Places:
    """Find out where ranks run. All ranks together: a name of each travels to rank 0, and a few numbers back.

    ``racks``: as the recipe has them.
    """
    with agreed():
        host = host_name()
    hosts: list[str] = gathered(host)
    answers: list[Any] | None = None
    if hosts:  # on rank 0
        peers, ranks_of = peers_of(hosts, racks), defaultdict[str, list[int]](list)
        for rank, each in enumerate(hosts):
            ranks_of[each].append(rank)
        kept = {keeper: rank for rank, keeper in enumerate(peers.keeper_of or ())}
        answers = [
            (ranks_of[h][0] == r, tuple(ranks_of[h]), peers.keeper_of and peers.keeper_of[r], kept.get(r), peers.apart)
            for r, h in enumerate(hosts)
        ]
    answer: list[Any] = [None]
    dist.scatter_object_list(answer, answers, src=0)
    is_leader, ranks_here, keeper, kept_for, apart = answer[0]
    return Places(memory_group(), host, is_leader, ranks_here, keeper, kept_for, apart, tuple(hosts))


def memory_group() -> dist.ProcessGroup:
    """Return a group of all ranks, over gloo, whose connections are made at their first message. All ranks together."""
    return dist.new_group(backend="gloo", timeout=LONGEST_WAIT, group_desc="memory")
