"""The numbers of a rank: how often what happened, in which phase of its life."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

_PHASE = "_phase_that_started_it"


class Tally:
    """Counts by phase and name. What a thread does counts for the phase that started the thread.

    Attributes:
        counts: phase -> name -> number.
    """

    def __init__(self, phase: str):
        self.phase = phase
        self.counts: dict[str, Counter[str]] = {}
        self._lock = threading.Lock()

    def add(self, name: str, number: int = 1) -> None:
        """Count ``name`` so many times more."""
        phase = getattr(threading.current_thread(), _PHASE, None) or self.phase
        with self._lock:
            self.counts.setdefault(phase, Counter())[name] += number

    def of(self, phase: str, prefix: str = "") -> dict[str, int]:
        """Return the counts of a phase whose names begin with ``prefix``, without it."""
        return {k.removeprefix(prefix): v for k, v in self.counts.get(phase, {}).items() if k.startswith(prefix)}


@contextmanager
def threads_keep_their_phase(tally: Tally) -> Iterator[None]:
    """Let every thread that is started inside count for the phase that starts it."""
    start = threading.Thread.start

    def start_in_phase(thread: threading.Thread) -> None:
        setattr(thread, _PHASE, getattr(threading.current_thread(), _PHASE, None) or tally.phase)
        start(thread)

    threading.Thread.start = start_in_phase
    try:
        yield
    finally:
        threading.Thread.start = start
