"""Finding the rank that slows the others down.

Every rank takes the same time for a step, because all wait for the slowest. What tells them apart is work that waits
for nobody: each rank times its attention blocks, which exchange nothing (but over TP and CP, whose ranks wait for each
other there and so share a number). The times of a block are compared every so many steps.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from parallel.world import host_name


@dataclass(frozen=True)
class Slowest:
    """The rank that took longest for the same work, and how many times the median rank's seconds that was."""

    rank: int
    host: str
    ratio: float


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


class WorkClock:
    """Sums the seconds of this rank's attention blocks in training, forward; per block, as stages hold different
    numbers.

    On a GPU a block lies between two events, which are read once the GPU has passed them and then used again: there are
    as many as the host runs ahead, however many steps go by before somebody compares.
    """

    def __init__(self, chunks: list[torch.nn.Module], device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._device = device
        self._seconds, self._calls, self._started = 0.0, 0, 0.0
        self._open: tuple[Any, Any] | None = None  # the block that runs now
        self._ahead: deque[tuple[Any, Any]] = deque()  # blocks the GPU may not have passed yet, oldest first
        self._idle: list[tuple[Any, Any]] = []
        for module in (m for chunk in chunks for n, m in chunk.named_modules() if n.endswith(".self_attention")):
            module.register_forward_pre_hook(self._begin)
            module.register_forward_hook(self._end)

    def _begin(self, module: torch.nn.Module, inputs: object) -> None:
        if not module.training:
            return
        if not self._on_gpu:
            self._started = time.perf_counter()
            return
        while self._ahead and self._ahead[0][1].query():
            self._read()
        pair = self._idle.pop() if self._idle else (_event(), _event())
        pair[0].record()
        self._open = pair

    def _end(self, module: torch.nn.Module, inputs: object, output: object) -> None:
        if not module.training:
            return
        if not self._on_gpu:
            self._seconds += time.perf_counter() - self._started
            self._calls += 1
            return
        assert self._open is not None, "a block ends that never began"
        self._open[1].record()
        self._ahead.append(self._open)
        self._open = None

    def _read(self) -> None:
        """Count the oldest block, which the GPU has passed."""
        begin, end = pair = self._ahead.popleft()
        self._seconds += begin.elapsed_time(end) / 1000
        self._calls += 1
        self._idle.append(pair)

    def compare(self) -> Slowest:
        """Return the slowest rank since the last call. Collective; the same answer on all ranks."""
        while self._ahead:
            self._ahead[0][1].synchronize()
            self._read()
        mine = torch.tensor([self._seconds / max(self._calls, 1)], dtype=torch.float64, device=self._device)
        all_ranks = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(all_ranks, mine)
        self._seconds, self._calls = 0.0, 0
        seconds = torch.cat(all_ranks)
        rank = int(seconds.argmax())
        host = [host_name()]
        dist.broadcast_object_list(host, src=rank)
        # The lower median: of two ranks the faster one is the measure.
        ratio = (seconds[rank] / seconds.median().clamp(min=1e-9)).item()
        return Slowest(rank, host[0], ratio)
