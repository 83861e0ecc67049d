"""What one rank has found out about its node and its device."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RankFacts:
    """Facts of one rank; what a node has once is said by its first rank alone.

    Attributes:
        node: its number, in the order of ranks.
        host: its name.
        device: name of the GPU, or ``cpu``.
        tflops: of a matrix product, 10^12 operations a second.
        within: gigabytes (10^9) a second that a message took to the next rank of the node; None where it is alone.
        between: likewise to the same rank of the next node.
        clock_seconds: how far the node's clock is ahead of rank 0's.
        digests: what must be the same on all nodes, such as ``code``: name -> digest.
        problems: what makes the node unfit, a line each.
        remarks: what was not looked at, and why.
    """

    rank: int
    node: int
    local_rank: int
    host: str
    device: str
    tflops: float
    within: float | None = None
    between: float | None = None
    clock_seconds: float = 0.0
    digests: dict[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """What is to be said of a host. ``unfit``: the run must not start there."""

    host: str
    said: str
    unfit: bool

    def __str__(self) -> str:
        return f"{self.host}: {self.said}"
