"""Boxes of a tensor: which of them a run of its numbers covers. Arithmetic on shapes, without tensors.

ZeRO-1 gives a rank a run of a parameter's numbers, in row-major order, that may begin and end in the middle of a row.
Checkpoints know boxes: a first corner and an extent along every axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import prod
from typing import NamedTuple

import numpy as np


class Box(NamedTuple):
    """A box of a tensor: its first corner and its extent, a number for every axis."""

    start: tuple[int, ...]
    extent: tuple[int, ...]


def even_runs(sizes: Sequence[int], ranks: int) -> list[list[tuple[int, int]]]:
    """Return, of every parameter of so many numbers, the run that each rank has where all of them, one after the other,
    are cut evenly: [parameter][rank] -> (start, end)."""
    total, first, found = sum(sizes), 0, []
    cuts = [total * rank // ranks for rank in range(ranks + 1)]
    for size in sizes:
        ends = [min(max(cut - first, 0), size) for cut in cuts]
        found.append(list(pairwise(ends)))
        first += size
    return found


def boxes_of_run(shape: Sequence[int], start: int, end: int, limit: int) -> Iterator[Box]:
    """Yield boxes, in row-major order, that cover the numbers [start, end) of a row-major tensor and no others.

    Args:
        limit: numbers of a box at most.
    """
    if start >= end:
        return
    if len(shape) == 0:
        yield Box((), ())
        return
    rest = tuple(shape[1:])
    row = prod(rest)
    first, last = start // row, -(-end // row)  # rows that are touched
    if start % row or last - first == 1 or row > limit:
        within = min(end, (first + 1) * row)
        for box in boxes_of_run(rest, start - first * row, within - first * row, limit):
            yield Box((first, *box.start), (1, *box.extent))
        yield from boxes_of_run(shape, within, end, limit)
        return
    rows = min(end // row - first, max(limit // row, 1))
    yield Box((first, *(0,) * len(rest)), (rows, *rest))
    yield from boxes_of_run(shape, (first + rows) * row, end, limit)


def common_box(one: Box, other: Box) -> Box | None:
    """Return what two boxes of a tensor have in common; None where that is nothing."""
    start = tuple(map(max, one.start, other.start))
    ends = (min(a + b, c + d) for a, b, c, d in zip(one.start, one.extent, other.start, other.extent))
    extent = tuple(end - begin for begin, end in zip(start, ends))
    return Box(start, extent) if all(size > 0 for size in extent) else None


def is_partition(boxes: Sequence[Box], numbers: int) -> bool:
    """Return whether boxes, each with numbers and all within so many, have none in common and leave none out."""
    if sum(prod(box.extent) for box in boxes) != numbers:
        return False
    if len(boxes) < 2:
        return True
    first = np.array([box.start for box in boxes])
    behind = first + np.array([box.extent for box in boxes])
    return all(
        np.count_nonzero(((first < behind[n]) & (first[n] < behind)).all(axis=1)) == 1 for n in range(len(boxes))
    )


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a row-major tensor, in numbers."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
