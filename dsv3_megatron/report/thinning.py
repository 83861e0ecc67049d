"""Curves of any length in bounded memory, built while a file is read."""

from __future__ import annotations

from typing import Any

Point = tuple[float, float]
MOST_BUCKETS = 800  # as many points as are drawn as they are (charts.thinned)


class Envelope:
    """The lowest and the highest point of every bucket of so many points, so that no spike is lost.

    Buckets hold one point each until there are too many of them; then two become one, again and again.
    """

    def __init__(self, most: int = MOST_BUCKETS):
        self._most, self._size, self._filled = most, 1, 0
        self._buckets: list[tuple[Point, Point]] = []  # low, high

    def add(self, x: float, y: float) -> None:
        """Take the next point."""
        point = (x, y)
        if self._filled == 0:
            if len(self._buckets) == self._most:
                pairs = zip(self._buckets[::2], self._buckets[1::2], strict=True)
                self._buckets = [_joined(first, second) for first, second in pairs]
                self._size *= 2
            self._buckets.append((point, point))
        else:
            low, high = self._buckets[-1]
            self._buckets[-1] = (point if y < low[1] else low, point if y > high[1] else high)
        self._filled = (self._filled + 1) % self._size

    def points(self) -> list[Point]:
        """Return the points that are left, at most two a bucket, in order."""
        found: list[Point] = []
        for low, high in self._buckets:
            found += [low] if low == high else sorted((low, high))
        return found


def _joined(first: tuple[Point, Point], second: tuple[Point, Point]) -> tuple[Point, Point]:
    low, high = min(first[0], second[0], key=lambda p: p[1]), max(first[1], second[1], key=lambda p: p[1])
    return low, high


class Sample:
    """Every n-th of any number of rows, at most ``most`` of them; n doubles whenever there are more."""

    def __init__(self, most: int):
        assert most % 2 == 0, most
        self._most, self._every, self._seen = most, 1, 0
        self.rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        """Take the next row, or leave it."""
        if self._seen % self._every == 0:
            if len(self.rows) == self._most:
                self.rows, self._every = self.rows[::2], 2 * self._every
            self.rows.append(row)
        self._seen += 1
