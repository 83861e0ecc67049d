"""What a Parquet file says of its pages, before any is unpacked: a few hundred bytes may stand for gigabytes.

The sizes in the footer and those in front of each page are written independently of each other, and what is allocated
follows the latter. Both are read here: pyarrow does not show the latter, and ends the process at some damaged footers
when it is asked for a column's metadata (26.0). Little of the format is needed: FileMetaData and PageHeader of
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift in Thrift's compact protocol.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

_END = struct.Struct("<I4s")  # bytes of the footer, mark
_MARK = b"PAR1"
_FOOTER_BYTES = 1 << 26
_USUAL_BYTES = 1 << 9
_HEADER_BYTES = 1 << 16  # of a page's header, with statistics; more is refused
_MOST_DEPTH = 16
_DICTIONARY = 2  # PageType.DICTIONARY_PAGE
_BOOLEANS, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 12


class PagesError(Exception):
    """Pages that cannot be read. The message says why."""


@dataclass(frozen=True)
class ColumnChunk:
    """The bytes on disk that hold a column's values of a group of rows: ``size`` from ``start`` on."""

    start: int
    size: int


@dataclass(frozen=True)
class Pages:
    """The largest pages of a chunk, unpacked, in bytes. ``dictionary``: of which each row may hold any part."""

    data: int = 0
    dictionary: int = 0


def chunks_of(file: BinaryIO, name: str) -> list[ColumnChunk]:
    """Return the chunk of a column for each group of rows. Raises: OSError. PagesError: the footer is damaged."""
    size = os.fstat(file.fileno()).st_size
    file.seek(max(0, size - _END.size))
    end = file.read(_END.size)
    length, mark = _END.unpack(end) if len(end) == _END.size else (0, b"")
    if mark != _MARK or length > size - _END.size:
        raise PagesError("the footer is damaged")
    if length > _FOOTER_BYTES:
        raise PagesError(f"a footer of {length:,} bytes")
    file.seek(size - _END.size - length)
    reader = _Compact(file.read(length), "the footer is damaged")
    groups: list[list[ColumnChunk]] = []
    reader.structure({4: lambda: reader.items(lambda: groups.append(_group(reader, name.encode())))})
    if any(len(found) != 1 for found in groups):
        raise PagesError("the footer is damaged")
    return [found[0] for found in groups]


def _group(reader: _Compact, name: bytes) -> list[ColumnChunk]:
    """Return the chunks of a RowGroup that are of the column."""
    found: list[ColumnChunk] = []

    def column() -> None:
        path: list[bytes] = []
        places, integers = _integers(reader, (7, 9, 11))
        names = {3: lambda: reader.items(lambda: path.append(reader.binary()))}
        reader.structure({3: lambda: reader.structure({**names, **integers})})
        if path == [name]:
            if not {7, 9} <= places.keys():
                raise PagesError("the footer is damaged")
            data, dictionary = places[9], places.get(11, 0)
            start = dictionary if 0 < dictionary < data else data
            if start < 0 or places[7] < 0:
                raise PagesError("the footer is damaged")
            found.append(ColumnChunk(start, places[7]))

    reader.structure({1: lambda: reader.items(column)})
    return found


def pages_of(file: BinaryIO, chunk: ColumnChunk) -> Pages:
    """Return the largest pages of a chunk. Raises: OSError. PagesError: a header is damaged."""
    at, stop = chunk.start, chunk.start + chunk.size
    data = dictionary = 0
    while at < stop:
        size, (kind, unpacked, packed) = _header(file, at, stop)
        if kind == _DICTIONARY:
            dictionary = max(dictionary, unpacked)
        else:
            data = max(data, unpacked)
        at += size + packed
    return Pages(data, dictionary)


def _header(file: BinaryIO, at: int, stop: int) -> tuple[int, tuple[int, int, int]]:
    """Return of the header of a page its bytes, and (type, size unpacked, size). Raises: OSError. PagesError."""
    file.seek(at)
    data = file.read(min(_USUAL_BYTES, stop - at))
    try:
        return _page(data)
    except PagesError:
        return _page(data + file.read(min(_HEADER_BYTES, stop - at) - len(data)))


def _page(data: bytes) -> tuple[int, tuple[int, int, int]]:
    reader = _Compact(data, "a page's header is damaged")
    found, integers = _integers(reader, (1, 2, 3))
    reader.structure(integers)
    if len(found) < 3 or min(found[2], found[3]) < 0:
        raise PagesError("a page's header is damaged")
    return reader.at, (found[1], found[2], found[3])


def _integers(reader: _Compact, numbers: Iterable[int]) -> tuple[dict[int, int], dict[int, Callable[[], object]]]:
    """Return (what will be read of some fields, what reads each of them)."""
    found: dict[int, int] = {}

    def read(number: int) -> None:
        found[number] = reader.signed()

    return found, {number: partial(read, number) for number in numbers}


class _Compact:
    """Reads a structure of Thrift's compact protocol; what nobody asks for is passed over. ``at``: how far it is."""

    def __init__(self, data: bytes, damaged: str):
        """``damaged``: what to say where it is none."""
        self._data, self._damaged, self.at = data, damaged, 0

    def structure(self, wanted: Mapping[int, Callable[[], object]], depth: int = 0) -> None:
        """Read a structure, and fields by their numbers with ``wanted``. Raises PagesError."""
        if depth > _MOST_DEPTH:
            raise PagesError(self._damaged)
        number = 0
        while byte := self._take(1)[0]:
            number = number + (byte >> 4) if byte >> 4 else self.signed()
            if number in wanted:
                wanted[number]()
            else:
                self._skip(byte & 15, depth)

    def items(self, read: Callable[[], object]) -> None:
        """Read a list, each of its items with ``read``."""
        for _ in range(self._list()[0]):
            read()

    def binary(self) -> bytes:
        """Read bytes."""
        return self._take(self._varint())

    def signed(self) -> int:
        """Read an integer."""
        value = self._varint()
        return value >> 1 ^ -(value & 1)

    def _list(self) -> tuple[int, int]:
        """Return (items, their kind)."""
        byte = self._take(1)[0]
        size = self._varint() if byte >> 4 == 15 else byte >> 4
        if size > len(self._data) - self.at:  # an item takes a byte or more
            raise PagesError(self._damaged)
        return size, byte & 15

    def _take(self, size: int) -> bytes:
        found = self._data[self.at : self.at + size]
        if len(found) < size:
            raise PagesError(self._damaged)
        self.at += size
        return found

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise PagesError(self._damaged)

    def _skip(self, kind: int, depth: int) -> None:
        if depth > _MOST_DEPTH:
            raise PagesError(self._damaged)
        if kind in _BOOLEANS:
            return
        if kind == _BYTE:
            self._take(1)
        elif kind in _INTEGERS:
            self._varint()
        elif kind == _DOUBLE:
            self._take(8)
        elif kind == _BINARY:
            self.binary()
        elif kind in _LISTS:
            size, item = self._list()
            for _ in range(size):
                self._skip(_BYTE if item in _BOOLEANS else item, depth + 1)
        elif kind == _STRUCT:
            self.structure({}, depth + 1)
        else:
            raise PagesError(self._damaged)
