"""The inputs cut into tasks: a function of the inputs and the size of a shard alone.

Workers, kills and nodes decide only who does a task and when. So the shards, which tasks write, are the same whoever
made them. Small files share a task; a large file is several, each of which begins where its bytes, unpacked, pass a
multiple of the task's size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from dsv3_megatron.data.raw.compressed import Place
from dsv3_megatron.data.raw.documents import Span
from dsv3_megatron.data.raw.inputs import Found, InputFile

BYTES_PER_TOKEN = 4  # of text: a task makes about one shard
UNPACKED_TIMES = 3  # what a compressed file grows by, about
TASKS_AT_LEAST = 64  # of a corpus that is not tiny, so that there is work for all cores
LEAST_BYTES = 4 << 20

Key = tuple[int, int, int]  # source, unit, piece


@dataclass(frozen=True)
class Unit:
    """Files that make tasks together: several small ones, or one large one, which is cut into pieces.

    Args:
        piece_bytes: of its content that a piece has; None = it is one piece.
        pieces: which are this node's, from and to; no end where only reading it tells how many there are.
    """

    source: int
    number: int
    files: tuple[InputFile, ...]
    piece_bytes: int | None
    pieces: tuple[int, int | None]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class Task:
    """What one worker does at once, done as a whole or not at all."""

    key: Key
    spans: tuple[Span, ...]


class Reached(Protocol):
    """How far a task came that is done."""

    ended: bool  # its file has no more
    disk: int  # bytes of its file that were read
    place: tuple[int, int, int]  # of a Place


def units_of(inputs: list[Found], shard_tokens: int) -> list[Unit]:
    """Return the units of all inputs, in order."""
    total = sum(text_bytes(file) for found in inputs for file in found.files)
    target = min(BYTES_PER_TOKEN * shard_tokens, max(LEAST_BYTES, total // TASKS_AT_LEAST))
    units: list[Unit] = []
    group: list[InputFile]
    for source, found in enumerate(inputs):
        number, group, size = 0, [], 0
        for file in (*found.files, None):
            large = file is not None and file.kind != "text" and text_bytes(file) > target
            if group and (file is None or large or size >= target):
                units.append(Unit(source, number, tuple(group), None, (0, 1)))
                number, group, size = number + 1, [], 0
            if file is not None and large:
                known = None if file.compressed or file.kind == "table" else -(-file.size // target)
                units.append(Unit(source, number, (file,), target, (0, known)))
                number += 1
            elif file is not None:
                group.append(file)
                size += text_bytes(file)
    return units


def share_of(units: list[Unit], part: int, parts: int) -> list[Unit]:
    """Return the units, and of a large one the pieces, that are one of ``parts`` (from 1): a run of about equal size.

    A compressed file or a table is of one part, for nobody knows its pieces without reading it.
    """
    total = sum(unit.size for unit in units)
    found, before = [], 0
    for unit in units:
        first, stop = unit.pieces
        count = 1 if stop is None else stop - first
        # the part that the middle of a piece falls into
        owners = [min(parts, 1 + (2 * before * count + (2 * n + 1) * unit.size) * parts // (2 * count * max(total, 1)))
                  for n in range(count)]  # fmt: skip
        mine = [n for n, owner in enumerate(owners) if owner == part]
        if mine:
            found.append(unit if stop is None else replace(unit, pieces=(mine[0], mine[-1] + 1)))
        before += unit.size
    return found


Pieces = Mapping[int, Reached]  # of a unit, those that are done


def tasks_left(units: list[Unit], done: Mapping[tuple[int, int], Pieces]) -> Iterator[Task]:
    """Yield the tasks that are known to be left, in order; to be asked again when they are done, until there is none.

    Args:
        done: by (source, unit). Looked at when the next task is asked for: a place inside a file that another task
            found spares reading up to it.
    """
    for unit in units:
        pieces = done.get((unit.source, unit.number), {})
        for piece in _numbers(unit, pieces):
            if piece not in pieces:
                yield _task(unit, piece, done.get((unit.source, unit.number), {}))


def _numbers(unit: Unit, done: Pieces) -> range:
    first, stop = unit.pieces
    if stop is not None:
        return range(first, stop)
    assert unit.piece_bytes is not None
    if ended := [piece for piece, task in done.items() if task.ended]:
        return range(min(ended) + 1)
    if not done:
        return range(max(1, UNPACKED_TIMES * unit.size // unit.piece_bytes))
    # what is read so far tells how many pieces the rest makes
    last = max(done)
    return range(last + 1 + max(1, (unit.size - done[last].disk) * (last + 1) // max(done[last].disk, 1)))


def _task(unit: Unit, piece: int, done: Pieces) -> Task:
    key = (unit.source, unit.number, piece)
    if unit.piece_bytes is None:
        return Task(key, tuple(Span(file) for file in unit.files))
    first, place = piece * unit.piece_bytes, Place()
    if earlier := [other for other in done if other < piece]:
        found = Place(*done[max(earlier)].place)
        place = found if found.content < first else place
    return Task(key, (Span(unit.files[0], first, first + unit.piece_bytes, place),))


def text_bytes(file: InputFile) -> int:
    """Return how much text a file holds, about."""
    return file.size * (UNPACKED_TIMES if file.compressed or file.kind == "table" else 1)
