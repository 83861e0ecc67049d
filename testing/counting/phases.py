"""All instruments together, and the phases of a life."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from testing.counting.collectives import Used, counted_collectives
from testing.counting.files import counted_files
from testing.counting.memory import forget_peak, give_back_at_once, peak_bytes, process_bytes, resident_bytes
from testing.counting.tally import Tally, threads_keep_their_phase


@dataclass
class Cost:
    """What a phase took beside what is counted: wall time, memory, and all bytes that the process moved."""

    seconds: float = 0.0
    peak_bytes: int = 0
    growth_bytes: list[int] = field(default_factory=list)  # each time, of the peak over what was resident before
    process: dict[str, int] = field(default_factory=lambda: {"read": 0, "written": 0})


class Phases:
    """The phase that a rank is in. One that comes several times adds up its times and what it moved."""

    def __init__(self, first: str):
        self.tally = Tally(first)
        self.used = Used()
        self.costs: dict[str, Cost] = {}
        self._begin()

    @property
    def now(self) -> str:
        """The phase."""
        return self.tally.phase

    def enter(self, phase: str) -> str:
        """End the phase that this is and begin another one; return the one that ended."""
        ended = self.now
        cost = self.costs.setdefault(ended, Cost())
        cost.seconds += time.perf_counter() - self._started
        peak = peak_bytes()
        cost.peak_bytes = max(cost.peak_bytes, peak)
        cost.growth_bytes.append(peak - self._resident)
        for kind, number in process_bytes().items():
            cost.process[kind] += number - self._moved[kind]
        self.tally.phase = phase
        self._begin()
        return ended

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Be in a phase inside, and afterwards in the one before."""
        before = self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def found(self) -> dict[str, Any]:
        """Return everything as JSON takes it: counts, costs, and [description, size, messages] of every group used."""
        return {
            "counts": {phase: dict(counts) for phase, counts in self.tally.counts.items()},
            "costs": {phase: asdict(cost) for phase, cost in self.costs.items()},
            "used": [[name, size, number] for (name, size), number in sorted(self.used.items())],
        }

    def _begin(self) -> None:
        forget_peak()
        self._started, self._resident, self._moved = time.perf_counter(), resident_bytes(), process_bytes()


@contextmanager
def counted(first: str, place_of: Callable[[str], str | None]) -> Iterator[Phases]:
    """Count inside, beginning in phase ``first``; ``place_of`` as for :func:`counted_files`."""
    give_back_at_once()
    phases = Phases(first)
    with ExitStack() as stack:
        stack.enter_context(threads_keep_their_phase(phases.tally))
        phases.used = stack.enter_context(counted_collectives(phases.tally))
        stack.enter_context(counted_files(phases.tally, place_of))
        yield phases
        phases.enter("after")
