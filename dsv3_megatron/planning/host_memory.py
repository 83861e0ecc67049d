"""What states of a run in host memory cost a node, and what of them travels (checkpoint/memory). Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

STATES = 2  # the last that is whole, and the one that is being kept


@dataclass(frozen=True)
class StatesInMemory:
    """The cost of ``checkpoint.memory_every_steps``.

    Attributes:
        share_bytes: of a rank's share of a checkpoint: weights, masters, moments and average of its run of numbers.
        ranks_per_node: how many of them a node has.
        copies: of a share in memory: 2 with one on another node, 1 where there is none.
    """

    share_bytes: int
    ranks_per_node: int
    copies: int

    @property
    def lasting_bytes(self) -> int:
        """Host memory of a node between two saves: the last state, and what the next one is copied to first."""
        return self.ranks_per_node * self.share_bytes * (self.copies + 1)

    @property
    def peak_bytes(self) -> int:
        """Host memory of a node while a state is being kept and the one before it still counts."""
        return self.ranks_per_node * self.share_bytes * (STATES * self.copies + 1)

    @property
    def file_bytes(self) -> int:
        """The part of that which lies in ``checkpoint.memory_path``, which must hold as much."""
        return self.ranks_per_node * self.share_bytes * STATES * self.copies

    @property
    def sent_bytes(self) -> int:
        """What a rank sends at each save, and receives: its share once. DualPipe's mirrored rank has none of it."""
        return self.share_bytes * (self.copies - 1)


def states_in_memory(share_bytes: int, ranks_per_node: int, nodes: int) -> StatesInMemory:
    """Return what it costs to keep states in memory on nodes of as many ranks each.

    ``share_bytes``: of the rank that has most.
    """
    return StatesInMemory(share_bytes, ranks_per_node, 2 if nodes > 1 else 1)
