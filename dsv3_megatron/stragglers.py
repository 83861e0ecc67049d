"""Finding the rank that slows the others down.

Every rank takes the same time for a step, because all wait for the slowest. What tells them apart is work that waits
for nobody: each rank times its attention blocks, which exchange nothing (but over TP and CP, whose ranks wait for each
other there and so share a number). The times of a block are compared every so many steps.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Slowest:
    """The rank that took longest for the same work, and how many times the median rank's seconds that was."""

    rank: int
    host: str
    ratio: float


class WorkClock:
    """Sums the seconds of this rank's attention blocks, forward; per block, as stages hold different numbers."""

    def __init__(self, chunks: list[torch.nn.Module], device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._device = device
        self._seconds, self._calls, self._started = 0.0, 0, 0.0
        self._events: list[tuple[Any, Any]] = []
        for module in (m for chunk in chunks for n, m in chunk.named_modules() if n.endswith(".self_attention")):
            module.register_forward_pre_hook(self._begin)
            module.register_forward_hook(self._end)

    def _begin(self, *unused: object) -> None:
        if self._on_gpu:
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
            self._events.append(pair)
        else:
            self._started = time.perf_counter()

    def _end(self, *unused: object) -> None:
        self._calls += 1
        if self._on_gpu:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._started

    def compare(self) -> Slowest:
        """Return the slowest rank since the last call. Collective; the same answer on all ranks."""
        if self._events:
            torch.cuda.synchronize()
            self._seconds = sum(a.elapsed_time(b) for a, b in self._events) / 1000
        mine = torch.tensor([self._seconds / max(self._calls, 1)], dtype=torch.float64, device=self._device)
        all_ranks = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(all_ranks, mine)
        self._seconds, self._calls, self._events = 0.0, 0, []
        seconds = torch.cat(all_ranks)
        rank = int(seconds.argmax())
        host = [socket.gethostname()]
        dist.broadcast_object_list(host, src=rank)
        # The lower median: of two ranks the faster one is the measure.
        ratio = (seconds[rank] / seconds.median().clamp(min=1e-9)).item()
        return Slowest(rank, host[0], ratio)
