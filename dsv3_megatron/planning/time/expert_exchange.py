"""What it takes to send tokens to their experts and back: nodes and ranks reached, bytes and seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence

from parallel.links import Fabric, Moved


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
