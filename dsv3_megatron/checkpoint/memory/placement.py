"""Which rank keeps the copy of which other's state: on another node, and in another rack where racks are known.

A rank's share of a checkpoint is its own run of weights, masters, moments and average (``checkpoint.shares``). ZeRO-1
divides them among all ranks that hold a stage, the mirrored pipeline rank of DualPipe among them, so no other rank has
what a share holds, and where the mirrored rank runs does not matter: the two copies of a share are all there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Peers:
    """Who keeps whose copy.

    Attributes:
        keeper_of: of every rank, the rank that keeps the copy of its share; each keeps one. None: nobody can.
        apart: what never holds both copies of a share: ``racks``, ``nodes``, or nothing (``""``).
    """

    keeper_of: tuple[int, ...] | None
    apart: str


def peers_of(hosts: Sequence[str], racks: Sequence[str] = ()) -> Peers:
    """Return who keeps whose copy.

    Ranks are put in a row, those of a rack side by side, and each sends as many places on, around the end, as the
    largest rack has ranks. That leaves the rack for every rank if no rack has more than half of all. Ranks of the same
    number on their nodes are paired where all nodes have as many.

    Args:
        hosts: the node of every rank.
        racks: as the recipe has them (``cluster.racks``).
    """
    first_of: dict[str, int] = {}
    for rank, host in enumerate(hosts):
        first_of.setdefault(host, rank)
    rack_of = [rack_of_host(host, racks) for host in hosts]
    first_in: dict[str, int] = {}
    for rank, rack in enumerate(rack_of):
        first_in.setdefault(rack, rank)
    row = sorted(range(len(hosts)), key=lambda rank: (first_in[rack_of[rank]], first_of[hosts[rank]], rank))
    for apart, places in (("racks" if racks else "nodes", rack_of), ("nodes", hosts)):
        shift = max(Counter(places).values())
        if 2 * shift <= len(row):
            keepers = dict(zip(row, row[shift:] + row[:shift]))
            return Peers(tuple(keepers[rank] for rank in range(len(row))), apart)
    return Peers(None, "")


def rack_of_host(host: str, racks: Sequence[str]) -> str:
    """Return the first of the racks whose patterns a host's name matches; a host of no rack is one of its own."""
    return next((rack for rack in racks if any(fnmatchcase(host, part.strip()) for part in rack.split(","))), host)
