"""How a count grows with the ranks of a world, and what it comes to in a larger one: a part of benchmarks/at_scale.py.

A count that is the same everywhere, within a twentieth of the largest or within one, is constant. Of the other forms
below the one is taken whose curve, by least squares, comes nearest to all counts, if it comes as near as that to each.
Where none does, the count grows as a power of the ranks, by the slope between its last points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

FORMS: tuple[tuple[str, Callable[[float], float]], ...] = (
    ("constant", lambda n: 0.0),
    ("log n", lambda n: math.log2(n)),
    ("n", lambda n: n),
    ("n log n", lambda n: n * math.log2(n)),
    ("n^2", lambda n: n * n),
)
_TOLERANCE, _LAST, _FLAT = 0.05, 3, 0.05


@dataclass(frozen=True)
class Growth:
    """A form, and its curve: ``constant + slope * form(n)``; of a power, ``slope * n ** constant``."""

    form: str
    constant: float
    slope: float

    def at(self, ranks: int) -> float:
        """Return the count in a world of so many ranks."""
        if (form := dict(FORMS).get(self.form)) is not None:
            return self.constant + self.slope * form(ranks)
        return self.slope * ranks**self.constant

    @property
    def exponent(self) -> float:
        """The power of the ranks that it grows with in the end, without logarithms."""
        return {"constant": 0.0, "log n": 0.0, "n": 1.0, "n log n": 1.0, "n^2": 2.0}.get(self.form, self.constant)


def growth(ranks: Sequence[int], counts: Sequence[float]) -> Growth:
    """Return how a count grows. What falls, as each rank's share of something does, is constant at its last value."""
    if counts[-1] <= counts[0]:
        near = all(abs(count - counts[-1]) <= max(1.0, _TOLERANCE * max(counts)) for count in counts)
        return Growth("constant", sum(counts) / len(counts) if near else counts[-1], 0.0)
    near = []
    for name, form in FORMS:
        constant, slope = _line([form(n) for n in ranks], counts)
        far = max(abs(constant + slope * form(n) - count) for n, count in zip(ranks, counts))
        if slope >= 0 and far <= max(1.0, _TOLERANCE * max(counts)):
            near.append((far if name != "constant" else -1.0, Growth(name, constant, slope)))
    if near:
        return min(near, key=lambda found: found[0])[1]
    points = [(math.log(n), math.log(count)) for n, count in zip(ranks, counts) if count > 0][-_LAST:]
    constant, slope = _line([x for x, _ in points], [y for _, y in points])
    if abs(slope) < _FLAT:
        return Growth("constant", counts[-1], 0.0)
    return Growth(f"n^{slope:.1f}", slope, math.exp(constant))


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Return constant and slope by least squares; slope 0 where all x are the same."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / spread if spread else 0.0
    return mean_y - slope * mean_x, slope
