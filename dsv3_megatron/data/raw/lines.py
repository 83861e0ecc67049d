"""The lines of a file, span after span: what was unpacked on the way to one span is not unpacked again for the next.

A compressed stream can be read from its beginning alone. With a new start for every span, reading a file would cost the
square of its size.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

from dsv3_megatron.data.raw.compressed import Place, TornError, chunks
from dsv3_megatron.data.raw.inputs import InputFile

START = Place()


class CutError(Exception):
    """A file that cannot be read to its end. ``number``, ``line``: of the line that the damage cuts."""

    def __init__(self, torn: TornError, number: int, line: bytes):
        super().__init__(str(torn))
        self.torn, self.number, self.line = torn, number, line


class Lines:
    """Reads the lines of a file in order.

    Args:
        start: where reading begins.

    ``place``: the last in front of the lines read so far from where reading can begin. ``disk``: bytes of the file that
    were read. ``ended``: no line follows those that were asked for.
    """

    def __init__(self, file: InputFile, start: Place = START):
        self.file, self.place, self.disk, self.ended = file, start, start.disk, False
        self._latest = start  # perhaps behind the lines read so far
        self._chunks = chunks(file, start.disk)
        self._at, self._number = start.content, start.lines + 1  # of the next line
        self._whole: deque[bytes] = deque()  # lines that are unpacked and not taken
        self._parts: list[bytes] = []  # the beginning of the line after them
        self._in_line = False  # what is read next is the rest of a line that is passed over
        self._done: float = start.content  # no line that begins here or later has been taken

    def can_read(self, file: InputFile, first: int, place: Place) -> bool:
        """Return whether the lines from ``first`` on are still to come, and no further off than from ``place``."""
        return file == self.file and self._done <= first and self._at >= place.content

    def read(self, first: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
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
            self._at, self._number = begins + len(line) + 1, number + 1
            if begins >= first:
                yield number, line
        self._done = limit

    def _more(self, first: int, limit: float) -> bool:
        """Unpack a chunk into lines. Returns False where there is none. Raises: CutError."""
        try:
            chunk = next(self._chunks, None)
        except TornError as torn:
            line, self._parts = b"".join(self._parts), []
            if self._at < first or self._in_line:
                return False  # a span before this one reports it
            self._done = limit
            raise CutError(torn, self._number, line) from None
        if chunk is None:
            if rest := b"".join(self._parts):
                self._whole.append(rest)
                self._parts = []
            return bool(rest)
        self.disk = chunk.disk
        here = self._at + sum(map(len, self._parts))
        if chunk.member is not None:
            self._latest = Place(chunk.member, here, self._number - 1)
            self._look_back(limit)
        data = chunk.data
        if self._at < first or self._in_line:  # lines of earlier spans are counted, not made
            cut = data.find(b"\n", max(0, first - 1 - here)) + 1
            passed = cut or len(data)
            self._number += data.count(b"\n", 0, passed)
            self._at, self._parts, self._in_line = here + passed, [], not cut
            if not cut:
                return True
            data = data[passed:]
        *whole, rest = data.split(b"\n")
        if whole:
            whole[0] = b"".join((*self._parts, whole[0]))
            self._parts = []
            self._whole.extend(whole)
        self._parts.append(rest)
        return True

    def _look_back(self, limit: float) -> None:
        if self._latest.content < limit:
            self.place = self._latest
