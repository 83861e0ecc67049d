"""Signals that end a run after the step in hand. Imports nothing slow: a run listens before it imports torch."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

WARNING = signal.SIGUSR1  # SLURM's, before the time limit or a preemption
# Ctrl-C, a scheduler's end, a closed terminal, the warning
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, WARNING)
WARNED_FILE = "DSV3_WARNED_FILE"  # environment variable, set by the batch script


class StopSignals:
    """Turns the first signal into a wish to stop, which all ranks then share; a second one ends at once.

    While a run starts only the warning is kept: until the first step nothing can be lost, so that all others may end
    the process as they always do. ``with`` listens to all of them.
    """

    def __init__(self) -> None:
        self._noted = False
        self._before: dict[int, Any] = {}  # what signal.signal returned

    @property
    def wanted(self) -> bool:
        """Whether this process was asked to stop."""
        return self._noted

    def listen_early(self) -> StopSignals:
        """Keep a warning from now on, for a run that is still starting; return self."""
        self._before[WARNING] = signal.signal(WARNING, self._note)
        return self

    def look_back(self) -> None:
        """Take in a warning that came before this process listened: the batch job's shell has left a file."""
        file = os.environ.get(WARNED_FILE)
        self._noted = self._noted or bool(file and Path(file).exists())

    def __enter__(self) -> StopSignals:
        for number in STOPPING:
            if number not in self._before:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True
        signal.signal(number, self._before[number])  # torchrun passes Ctrl-C on: a second one is meant
