"""How much of a run's time is useful while failures come at random, and how often to save then.

Failures are a Poisson process: they come at a constant rate and know nothing of each other. A run saves every so many
seconds of training, each save stops training for a while, and may take longer to write beside it. After a failure the
run goes back to the newest save that was complete, and does again what came after it.

A run between two failures, and its recovery, are then a cycle of a renewal process, and the useful share has a closed
form: that of J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future
Generation Computer Systems 22 (2006), which counts failures during saves and recoveries as well. What is added here is
a save that is written beside training: it is of use only from its end on, and the next one waits for that. Where
several kinds of save exist, such as copies in memory and files, a kind that serves only the failures that the kinds
before it do not survive sees a run that the earlier failures have slowed down. That is an approximation, which a
simulation in the tests holds to a point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, expm1, inf, sqrt


@dataclass(frozen=True)
class Save:
    """A kind of save.

    Attributes:
        stall_seconds: that each stops training for.
        seconds: from the beginning of one until a run can go back to it; the stall is a part of it.
        recovery_seconds: from a failure until training goes on from such a save.
        share: of all failures, those after which the run goes back to this kind.
    """

    stall_seconds: float
    seconds: float
    recovery_seconds: float
    share: float = 1.0

    @property
    def beside_seconds(self) -> float:
        """How long training goes on while it is written."""
        return max(0.0, self.seconds - self.stall_seconds)


def young_interval(failures_per_second: float, stall_seconds: float) -> float:
    """Return the seconds of training between saves after J. W. Young, "A first order approximation to the optimum
    checkpoint interval", Communications of the ACM 17 (1974): sqrt(2 stall MTBF). Infinite where nothing fails."""
    return sqrt(2 * stall_seconds / failures_per_second) if failures_per_second else inf


def daly_interval(failures_per_second: float, stall_seconds: float) -> float:
    """Return the seconds of training between saves after Daly's higher-order estimate."""
    if not failures_per_second:
        return inf
    between = 1 / failures_per_second
    if stall_seconds >= 2 * between:
        return between
    half = stall_seconds / (2 * between)
    return sqrt(2 * stall_seconds * between) * (1 + sqrt(half) / 3 + half / 9) - stall_seconds


def best_intervals(failures_per_second: float, saves: Sequence[Save]) -> list[float]:
    """Return the best seconds of training between saves of each kind; infinite for one that no failure needs.

    One save is under way at a time, so that none comes before the last is written.

    Args:
        saves: that of the shortest recovery first; their shares add up to 1.
    """
    found: list[float] = []
    for number, save in enumerate(saves):
        slowed = useful_share(failures_per_second, saves[:number], found) if number else 1.0
        best = daly_interval(failures_per_second * save.share, save.stall_seconds)
        found.append(max(best * slowed if slowed else inf, save.beside_seconds))
    return found


def useful_share(failures_per_second: float, saves: Sequence[Save], intervals: Sequence[float]) -> float:
    """Return the share of the time, 0 to 1, that makes a run advance.

    Args:
        saves: as for :func:`best_intervals`.
        intervals: seconds of training between saves of each kind; infinite = never.
    """
    share = 1.0
    for save, interval in zip(saves, intervals, strict=True):
        share = _slowed(share, failures_per_second * save.share, save, interval)
    return share


def _slowed(share: float, rate: float, save: Save, interval: float) -> float:
    """Return what is left of a useful share with one more kind of save, and failures at ``rate`` that need it."""
    if interval == inf or not share:
        return 0.0 if rate else share
    # On the wall's clock: until the first save can be gone back to, and from one to the next, which waits for it.
    first = interval / share + save.seconds
    cycle = max(interval / share + save.stall_seconds, save.seconds)
    if not rate:
        return interval / cycle
    return -rate * interval * exp(-rate * (first + save.recovery_seconds)) / expm1(-rate * cycle)
