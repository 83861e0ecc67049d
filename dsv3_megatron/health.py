"""Being asked to stop: signals that end a run after the step in hand."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType

import torch
import torch.distributed as dist

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C, a scheduler's end, SLURM's warning


class StopSignals:
    """Turns the first signal into a wish to stop, which all ranks then share; a second one ends at once."""

    def __init__(self) -> None:
        self.wanted = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for number in STOPPING:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
        signal.signal(number, self._before[number])  # torchrun passes Ctrl-C on: a second one is meant

    def agreed(self, device: torch.device, flags: Sequence[int] = ()) -> list[int]:
        """Return whether any rank was asked to stop (1 or 0), then each of ``flags``: the largest over all ranks."""
        told = torch.tensor([int(self.wanted), *flags], device=device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return told.tolist()
