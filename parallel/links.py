"""Bytes that collectives move, and how long that takes, from the sizes of groups and links alone.

Conventions: bytes are what one rank sends; a ring moves (n - 1)/n of a buffer; ranks are placed node by node, and a
group that spans nodes is bound by its slowest link. Knows no model.
"""

from __future__ import annotations

import math
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
    """Nodes of GPUs: a fast link inside, a slower one between.

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


def nodes_reached(nodes: int, groups: int, chosen_groups: int, experts_per_token: int) -> float:
    """Return how many of ``nodes`` one token's experts lie on, on average, with even routing.

    Experts are spread evenly and in order over the nodes; a token takes ``experts_per_token`` of them from
    ``chosen_groups`` of ``groups`` (arXiv 2412.19437 section 2.1.2: groups are nodes, 4 of 8).
    """
    each = experts_per_token / chosen_groups  # experts from one chosen group
    if nodes >= groups:
        span = nodes / groups
        return chosen_groups * span * (1 - (1 - 1 / span) ** each) if span > 1 else float(chosen_groups)
    per_node = groups // nodes
    none_here = math.comb(groups - per_node, chosen_groups) / math.comb(groups, chosen_groups)
    return nodes * (1 - none_here)


def ranks_reached(ranks: int, experts: int, groups: int, chosen_groups: int, experts_per_token: int) -> float:
    """Return on how many of ``ranks`` one token's experts lie, on average, with even routing.

    Two experts of a token may lie on one rank, which then gets the token once. Experts are spread as for
    :func:`nodes_reached`; those of a chosen group are taken to be a whole number, the nearest.
    """
    here, in_group = experts // ranks, experts // groups
    if here >= in_group:
        spanned = here // in_group
        return ranks * (1 - math.comb(groups - spanned, chosen_groups) / math.comb(groups, chosen_groups))
    each = min(max(1, round(experts_per_token / chosen_groups)), in_group)
    elsewhere = math.comb(in_group - here, each) / math.comb(in_group, each)
    return chosen_groups * in_group / here * (1 - elsewhere)


def expert_exchange(
    fabric: Fabric, members: Sequence[int], *, tokens: float, experts_per_token: int, nodes: float, token_bytes: float
) -> Moved:
    """Return what dispatching ``tokens`` costs a rank (combining costs the same with its own ``token_bytes``).

    A token crosses to each node it is wanted on once, and is handed on there over the fast link to each of its experts
    (arXiv 2412.19437 section 3.2.2). The two run at the same time.

    Args:
        nodes: that a token's experts lie on (:func:`nodes_reached`), the sender's own among them.
    """
    size, spans = len(members), fabric.nodes_of(members)
    if size == 1:
        return Moved()
    inside = size // spans
    across = nodes * (spans - 1) / spans if spans > 1 else 0.0
    # Two experts of a token may lie on one rank of a node, which then gets the token once.
    ranks_reached = inside * (1 - (1 - 1 / inside) ** (experts_per_token / nodes))
    handed = nodes * ranks_reached * (inside - 1) / inside
    intra, inter = tokens * handed * token_bytes, tokens * across * token_bytes
    wire = tokens * (nodes if fabric.own_node and spans > 1 else across) * token_bytes
    seconds = max(fabric.intra.seconds(intra), fabric.inter.seconds(wire) if spans > 1 else 0.0)
    return Moved(intra, inter, seconds)
