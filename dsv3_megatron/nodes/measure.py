"""What a rank measures with the others: a matrix product, messages to two neighbours, and the clock.

Needs the default process group, and nothing of a model. All ranks call these functions together.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from parallel.device import has_streams

# A product that fills a GPU for some milliseconds, and one that a core does in as many; a message that shows bandwidth
# and not latency. On a GPU torch.bfloat16, which all GPUs this project supports have.
_SIDE = {"cuda": 8192, "cpu": 384}
_MESSAGE = {"cuda": 256 << 20, "cpu": 4 << 20}  # bytes
_REPEATS = {"cuda": 20, "cpu": 4}
_PINGS = 5


@dataclass(frozen=True)
class Place:
    """A rank among nodes that all have as many ranks."""

    rank: int
    size: int
    local_size: int

    @property
    def node(self) -> int:
        """The number of its node."""
        return self.rank // self.local_size

    @property
    def nodes(self) -> int:
        """How many there are."""
        return self.size // self.local_size

    @property
    def local_rank(self) -> int:
        """Its number on the node."""
        return self.rank % self.local_size

    def neighbours(self, *, within: bool) -> tuple[int, int]:
        """Return (the rank before, the rank after) on a ring: of the node, or of this local rank on all nodes."""
        if within:
            first = self.node * self.local_size
            return first + (self.local_rank - 1) % self.local_size, first + (self.local_rank + 1) % self.local_size
        return (self.rank - self.local_size) % self.size, (self.rank + self.local_size) % self.size


def product_tflops(device: torch.device) -> float:
    """Return what a matrix product reaches, in 10^12 operations a second: the best of many, so that what else the host
    does counts little."""
    side, dtype = _SIDE[device.type], torch.bfloat16 if has_streams(device) else torch.float32
    a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(3 + _REPEATS[device.type]):  # the first ones choose a kernel, and raise the clock
        best = min(best, _timed(lambda: torch.mm(a, b), device))
    return 2 * side**3 / best / 1e12


def message_speed(place: Place, device: torch.device, *, within: bool) -> float | None:
    """Return at how many gigabytes (10^9 bytes) a second a message to the next rank passes, all at once; None where
    there is no other rank on that ring."""
    before, after = place.neighbours(within=within)
    if after == place.rank:
        return None
    sent = torch.zeros(_MESSAGE[device.type], dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)

    def exchange() -> None:
        operations = [dist.P2POp(dist.isend, sent, after), dist.P2POp(dist.irecv, received, before)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    exchange()  # opens the connection
    best = min(_timed(exchange, device) for _ in range(_REPEATS[device.type]))
    return sent.nbytes / best / 1e9


def clock_seconds(place: Place) -> float:
    """Return how far this node's clock is ahead of rank 0's: of a few questions, by the one that was answered fastest,
    whose answer is taken to be of the middle between question and answer (Cristian, 1989).

    The first rank of each node asks, one node after another: 5 messages a node.
    """
    ahead = 0.0
    for node in range(1, place.nodes):
        first = node * place.local_size
        if place.rank == 0:
            for _ in range(_PINGS):
                number = torch.zeros(1, dtype=torch.float64)
                dist.recv(number, src=first)
                dist.send(torch.tensor([time.time()], dtype=torch.float64), dst=first)
        elif place.rank == first:
            ahead = min(_ask() for _ in range(_PINGS))[1]
    return ahead


def _ask() -> tuple[float, float]:
    """Return (seconds that the answer took, how far this clock is ahead)."""
    answer, asked = torch.zeros(1, dtype=torch.float64), time.time()
    dist.send(torch.zeros(1, dtype=torch.float64), dst=0)
    dist.recv(answer, src=0)
    answered = time.time()
    return answered - asked, (asked + answered) / 2 - answer.item()


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a call takes, to the end of what it asks of the device."""
    if has_streams(device):
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if has_streams(device):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
