"""The lines of a file, span after span: what was unpacked on the way to one span is not unpacked again for the next.

A compressed stream can be read from its beginning alone. With a new start for every span, reading a file would cost the
square of its size.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from dsv3_megatron.data.raw.compressed import Place, TornError, chunks
from dsv3_megatron.data.raw.inputs import InputFile

START = Place()
DOCUMENT_BYTES = 64 << 20  # a row or a text at most, unless somebody says otherwise


@dataclass(frozen=True)
class LongLine:
    """A line of which nothing is kept, for it is longer than a document may be. ``size``: in bytes."""

    size: int


class CutError(Exception):
    """A file that cannot be read to its end. ``number``, ``line``: of the line that the damage cuts."""

    def __init__(self, torn: TornError, number: int, line: bytes):
        super().__init__(str(torn))
        self.torn, self.number, self.line = torn, number, line


class Lines:
    """Reads the lines of a file in order.

    Args:
        start: where reading begins.
        most: bytes of a line; nothing of a longer one is kept.

    ``place``: the last in front of the lines read so far from where reading can begin. ``disk``: bytes of the file that
    were read. ``ended``: no line follows those that were asked for.
    """

    def __init__(self, file: InputFile, start: Place = START, most: int = DOCUMENT_BYTES):
        self.file, self.place, self.disk, self.ended = file, start, start.disk, False
        self._latest = start  # perhaps behind the lines read so far
        self._chunks = chunks(file, start.disk)
        self._at, self._number = start.content, start.lines + 1  # of the next line
        self._most = most
        self._whole: deque[bytes | LongLine] = deque()  # lines that are unpacked and not taken
        self._parts: list[bytes] = []  # the beginning of the line after them
        self._begun = 0  # its bytes; where they are too many, there are no parts
        self._in_line = False  # what is read next is the rest of a line that is passed over
        self._done: float = start.content  # no line that begins here or later has been taken

    def can_read(self, file: InputFile, first: int, place: Place) -> bool:
        """Return whether the lines from ``first`` on are still to come, and no further off than from ``place``."""
        return file == self.file and self._done <= first and self._at >= place.content

    def read(self, first: int, stop: int | None) -> Iterator[tuple[int, bytes | LongLine]]:
        """Yield (number, line) of the lines that begin at byte ``first`` of the content or later, and before ``stop``.

        Raises: CutError: the file is torn in one of them. What lies behind counts as read.
        """
        limit = math.inf if stop is None else stop
        self._done = math.inf  # until all are taken
        self._look_back(limit)
        while self._at < limit:
            if not self._whole:
                if self._more(first, limit):
                    continue  # what was passed over may reach behind the limit
                self.ended = True
                break
            begins, number, line = self._at, self._number, self._whole.popleft()
            size = line.size if isinstance(line, LongLine) else len(line)
            self._at, self._number = begins + size + 1, number + 1
            if begins >= first:
                yield number, line
        self._done = limit

    def _more(self, first: int, limit: float) -> bool:
        """Unpack a chunk into lines. Returns False where there is none. Raises: CutError."""
        try:
            chunk = next(self._chunks, None)
        except TornError as torn:
            line = b"".join(self._parts)
            self._forget_begun()
            if self._at < first or self._in_line:
                return False  # a span before this one reports it
            self._done = limit
            raise CutError(torn, self._number, line) from None
        if chunk is None:
            if has_rest := self._begun > 0:
                self._whole.append(self._begun_line())
            return has_rest
        self.disk = chunk.disk
        here = self._at + self._begun
        if chunk.member is not None:
            self._latest = Place(chunk.member, here, self._number - 1)
            self._look_back(limit)
        data = chunk.data
        if self._at < first or self._in_line:  # lines of earlier spans are counted, not made
            cut = data.find(b"\n", max(0, first - 1 - here)) + 1
            passed = cut or len(data)
            self._number += data.count(b"\n", 0, passed)
            self._at, self._in_line = here + passed, not cut
            self._forget_begun()
            if not cut:
                return True
            data = data[passed:]
        *whole, rest = data.split(b"\n")
        for line in whole:
            if self._begun:
                self._begin(line)
                self._whole.append(self._begun_line())
            else:
                self._whole.append(line if len(line) <= self._most else LongLine(len(line)))
        self._begin(rest)
        return True

    def _begin(self, part: bytes) -> None:
        """Take more of a line that may have no end yet."""
        self._begun += len(part)
        if self._begun <= self._most:
            self._parts.append(part)
        else:
            self._parts = []

    def _begun_line(self) -> bytes | LongLine:
        """Return the line that was begun, and begin another."""
        line = b"".join(self._parts) if self._begun <= self._most else LongLine(self._begun)
        self._forget_begun()
        return line

    def _forget_begun(self) -> None:
        self._parts, self._begun = [], 0

    def _look_back(self, limit: float) -> None:
        if self._latest.content < limit:
            self.place = self._latest
