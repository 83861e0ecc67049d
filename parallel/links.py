"""Bytes that collectives move, and how long that takes, from the sizes of groups and links alone.

Conventions: bytes are what one rank sends; a ring moves (n - 1)/n of a buffer; ranks are placed node by node, and a
group that spans nodes is bound by its slowest link. Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """What one GPU gets out of a class of links, one way."""

    bytes_per_second: float
    latency_seconds: float

    def seconds(self, nbytes: float, messages: int = 1) -> float:
        """Return the time to send ``nbytes`` in so many dependent messages."""
        return messages * self.latency_seconds + nbytes / self.bytes_per_second


@dataclass(frozen=True)
class Fabric:
    """Nodes of GPUs: a fast link inside, a slower one between. Here a node is what the fast link joins, which may be
    the GPUs of several hosts (an NVLink domain).

    ``own_node``: the slower link's bandwidth counts, of dispatches and combines, what stays on its node as sent too, as
    DeepEP's benchmark prints it (its README).
    """

    gpus_per_node: int
    intra: Link
    inter: Link
    own_node: bool = False

    def nodes_of(self, members: Sequence[int]) -> int:
        """Return how many nodes a group of ranks lies on."""
        return len({rank // self.gpus_per_node for rank in members})

    def ring(self, members: Sequence[int], nbytes: float) -> Moved:
        """Return what a reduce-scatter or all-gather of a buffer of ``nbytes`` costs a rank.

        Across nodes it is done inside the nodes first, so that only 1/members-in-a-node of the buffer goes between.
        """
        size, nodes = len(members), self.nodes_of(members)
        if size == 1:
            return Moved()
        inside = size // nodes
        intra = nbytes * (inside - 1) / inside
        inter = nbytes / inside * (nodes - 1) / nodes
        seconds = (self.intra.seconds(intra, inside - 1) if inside > 1 else 0.0) + (
            self.inter.seconds(inter, nodes - 1) if nodes > 1 else 0.0
        )
        return Moved(intra, inter, seconds)

    def all_to_all(self, members: Sequence[int], nbytes: float) -> Moved:
        """Return what an even all-to-all costs a rank that has ``nbytes``: it keeps 1 / members of them, and sends to
        its node and to others at the same time."""
        size, nodes = len(members), self.nodes_of(members)
        if size == 1:
            return Moved()
        intra, inter = nbytes * (size // nodes - 1) / size, nbytes * (size - size // nodes) / size
        seconds = max(self.intra.seconds(intra), self.inter.seconds(inter) if nodes > 1 else 0.0)
        return Moved(intra, inter, seconds)

    def send(self, source: int, target: int, nbytes: float) -> Moved:
        """Return what a message between two ranks costs."""
        if source // self.gpus_per_node == target // self.gpus_per_node:
            return Moved(nbytes, 0.0, self.intra.seconds(nbytes))
        return Moved(0.0, nbytes, self.inter.seconds(nbytes))


@dataclass(frozen=True)
class Moved:
    """Bytes that one rank sends over each class of links, and the time that takes."""

    intra_bytes: float = 0.0
    inter_bytes: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Moved) -> Moved:
        return Moved(
            self.intra_bytes + other.intra_bytes, self.inter_bytes + other.inter_bytes, self.seconds + other.seconds
        )

    def __mul__(self, times: float) -> Moved:
        return Moved(self.intra_bytes * times, self.inter_bytes * times, self.seconds * times)
