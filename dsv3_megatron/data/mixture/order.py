"""Which source every sample of a run comes from, exact in every phase of a mixture, without counting up to it.

A source's due is its share summed up over the samples of a phase, a fraction E(n). Its turn j (from 0) is to be taken
after E has reached j, and no later than where E reaches j + 1. Where every sample goes to the turn that is due soonest
(earliest deadline first), no turn is ever late (Baruah, Cohen, Plaxton and Varvel 1996, on proportionate fairness): a
source has had E(n), rounded up or down, at every n, under shares that move as well as under constant ones.

Who had turns before n follows from what lies a little before n. A turn is open at n when it may already have been
taken and need not have been: at most one a source. Going on from where the first of the open turns could be taken
earliest leads to the same state as going on from the first sample, since all earlier turns are over by n either way.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

import numpy as np

from dsv3_megatron.data.mixture.phases import MixtureCurve, MixturePiece

BLOCK = 1 << 14  # samples whose turns are worked out together
_KEPT = 16  # blocks that are remembered: samples are read some steps ahead of those that are told of


class Moment(NamedTuple):
    """Where a source's due reaches a whole number of turns, in samples of the phase: between ``before`` and ``after``,
    which are the same where it does so exactly. After the phase's end ``short`` says how much of a turn is missing."""

    before: int
    after: int
    short: float = 0.0


@dataclass(frozen=True)
class Due:
    """What a source is due after n samples of a phase: (linear n + square n^2) / whole, for n up to ``length``."""

    linear: int
    square: int
    whole: int
    length: int | None

    def after(self, samples: int) -> tuple[int, int]:
        """Return (whole turns, the rest in parts of ``whole``)."""
        return divmod(self._parts(samples), self.whole)

    def _parts(self, samples: int) -> int:
        return (self.linear + self.square * samples) * samples

    def reaches(self, turns: int) -> Moment:
        """Return where so many turns are due."""
        wanted = turns * self.whole
        if self.length is not None and (there := self._parts(self.length)) < wanted:
            return Moment(self.length, self.length + 1, (wanted - there) / self.whole)
        if not wanted:
            return Moment(0, 0)
        if self.square:
            # Rounded down to whole numbers this may miss by one, never by more than the loops mend.
            root = math.isqrt(self.linear**2 + 4 * self.square * wanted)
            samples = 2 * wanted // (self.linear + root)
            while self._parts(samples) < wanted:
                samples += 1
            while self._parts(samples - 1) >= wanted:
                samples -= 1
        else:
            samples = -(-wanted // self.linear)
        return Moment(samples - (self._parts(samples) > wanted), samples)


@dataclass(frozen=True)
class _Block:
    """Samples that follow each other: whose each is [samples], and which of its source's turns [samples]."""

    whose: np.ndarray
    turn: np.ndarray
    after: tuple[int, ...]  # turns that each source had, the block's included


class Stretch:
    """The samples of one phase, numbered from 0; ``length`` None = without an end."""

    def __init__(self, dues: Sequence[Due | None], length: int | None):
        """``dues``: of each source; None = it has no turn in this phase."""
        self.length = length
        self._dues = dues
        self._blocks: dict[int, _Block] = {}

    def turn(self, sample: int) -> tuple[int, int]:
        """Return (source, which of its turns in this phase)."""
        block, place = self._block_of(sample)
        return int(block.whose[place]), int(block.turn[place])

    def counts(self, samples: int) -> list[int]:
        """Return the turns that each source had in the first ``samples`` samples."""
        number, place = divmod(samples, BLOCK)
        counts = list(self._state(number * BLOCK))
        if not place:
            return counts
        more = np.bincount(self._block(number).whose[:place], minlength=len(counts))
        return [count + int(extra) for count, extra in zip(counts, more)]

    def sample_of(self, source: int, turn: int) -> int | None:
        """Return the sample that is a source's turn; None: the phase ends before, or surely does."""
        if (due := self._dues[source]) is None:
            return None
        sample, last = due.reaches(turn).before, due.reaches(turn + 1).after
        last = last if self.length is None else min(last, self.length)
        while sample < last:
            block, place = self._block_of(sample)
            mine = np.flatnonzero((block.whose == source) & (block.turn == turn))
            if len(mine):
                return sample - place + int(mine[0])
            sample += len(block.whose) - place
        return None

    def _block_of(self, sample: int) -> tuple[_Block, int]:
        number, place = divmod(sample, BLOCK)
        return self._block(number), place

    def _block(self, number: int) -> _Block:
        if (known := self._blocks.get(number)) is not None:
            return known
        first = number * BLOCK
        stop = first + BLOCK if self.length is None else min(first + BLOCK, self.length)
        counts = list(self._state(first))
        whose = np.asarray(self._serve(counts, first, stop), dtype=np.int32)
        turn = np.empty(len(whose), dtype=np.int64)
        for source, after in enumerate(counts):
            mine = whose == source
            turn[mine] = np.arange(after - mine.sum(), after)
        made = _Block(whose, turn, tuple(counts))
        kept = list(self._blocks.items())[1 - _KEPT :]
        self._blocks = dict([*kept, (number, made)])  # replaced whole: another thread may be reading
        return made

    def _state(self, samples: int) -> Sequence[int]:
        """Return the turns that each source had before a sample, by the shortest way to it."""
        blocks = self._blocks
        if samples % BLOCK == 0 and (before := blocks.get(samples // BLOCK - 1)) is not None:
            return before.after
        opened = [
            due.reaches(turns).before
            for due in self._dues
            if due is not None
            for turns, rest in (due.after(samples),)
            if rest
        ]
        first = min(opened, default=samples)
        counts = self._fair_counts(first)
        self._serve(counts, first, samples)
        return counts

    def _fair_counts(self, samples: int) -> list[int]:
        """Return counts that can have been before a sample and from which no turn comes late: those that are soonest
        due have been taken."""
        found = [(0, 0) if due is None else due.after(samples) for due in self._dues]
        counts = [turns for turns, _ in found]
        opened = [
            (*self._order(due.reaches(turns + 1)), source)
            for source, (due, (turns, rest)) in enumerate(zip(self._dues, found))
            if due is not None and rest
        ]
        for *_, source in sorted(opened)[: samples - sum(counts)]:
            counts[source] += 1
        return counts

    @staticmethod
    def _order(deadline: Moment) -> tuple[int, float]:
        return deadline.after, deadline.short

    def _serve(self, counts: list[int], first: int, stop: int) -> list[int]:
        """Return the sources of samples ``first`` to ``stop``, whose turns ``counts`` counts before and after."""
        coming = []
        for source, due in enumerate(self._dues):
            if due is None:
                continue
            turn, opens = counts[source], due.reaches(counts[source])
            while opens.before < stop:
                closes = due.reaches(turn + 1)
                coming.append((opens.before, *self._order(closes), source))
                turn, opens = turn + 1, closes
        coming.sort()
        served: list[int] = []
        ready: list[tuple[int, float, int]] = []
        at = 0
        for sample in range(first, stop):
            while at < len(coming) and coming[at][0] <= sample:
                heapq.heappush(ready, coming[at][1:])
                at += 1
            *_, source = heapq.heappop(ready)
            served.append(source)
            counts[source] += 1
        return served


class Mixture:
    """Sample number -> source and the number of the sample in it, for the samples of a run."""

    def __init__(self, curve: MixtureCurve, sequence_length: int):
        """A phase begins with the first sequence that begins at its tokens or after them."""
        self.names = curve.names
        starts = [-(-piece.start // sequence_length) for piece in curve.pieces]
        self._starts, self._stretches = [], []
        for piece, start, stop in zip(curve.pieces, starts, [*starts[1:], None]):
            if start != stop:  # else it is shorter than a sequence, and none begins in it
                self._starts.append(start)
                length = None if stop is None else stop - start
                self._stretches.append(Stretch([_due(piece, name, length) for name in self.names], length))

    @cached_property
    def _before(self) -> list[list[int]]:
        """Samples of each source before each stretch."""
        found = [[0] * len(self.names)]
        for stretch in self._stretches[:-1]:
            assert stretch.length is not None
            found.append([a + b for a, b in zip(found[-1], stretch.counts(stretch.length))])
        return found

    def locate(self, number: int) -> tuple[int, int]:
        """Return (source, number of the sample in it): for each source 0, 1, 2, ... in the order of ``number``."""
        at = bisect_right(self._starts, number) - 1
        source, turn = self._stretches[at].turn(number - self._starts[at])
        return source, self._before[at][source] + turn

    def counts(self, samples: int) -> list[int]:
        """Return how many of the first ``samples`` samples are of each source."""
        at = bisect_right(self._starts, samples) - 1
        return [a + b for a, b in zip(self._before[at], self._stretches[at].counts(samples - self._starts[at]))]

    def number_of(self, source: int, inner: int) -> int | None:
        """Return the sample that is number ``inner`` of a source; None: the mixture never reads so far."""
        for start, before, stretch in zip(self._starts, self._before, self._stretches):
            if inner >= before[source]:
                found = stretch.sample_of(source, inner - before[source])
                if found is not None:
                    return start + found
        return None


def moved(then: Mixture, now: Mixture, samples: int) -> list[str]:
    """Return a line for each source of which another mixture counts more or fewer among the first ``samples`` samples,
    all of which were read under ``then``: what comes next of it is not what came last and one."""
    before, after = (dict(zip(mixture.names, mixture.counts(samples))) for mixture in (then, now))
    lines = []
    for name in now.names:
        read, counted = before.get(name, 0), after[name]
        if read > counted:
            lines.append(f"{read - counted:,} sequences of source {name} are read again")
        elif counted > read:
            lines.append(f"{counted - read:,} sequences of source {name} are left out")
    return lines


def _due(piece: MixturePiece, name: str, length: int | None) -> Due | None:
    nothing = Fraction(0)
    first, last = piece.first.get(name, nothing), piece.last.get(name, nothing)
    if not first and not last:
        return None
    square = nothing if length is None else (last - first) / (2 * length)
    whole = math.lcm(first.denominator, square.denominator)
    return Due(int(first * whole), int(square * whole), whole, length)
