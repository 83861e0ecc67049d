"""What a Parquet file says of its pages, before any is unpacked: a few hundred bytes may stand for gigabytes.

The sizes in the footer and those in front of each page are written independently of each other, and what is allocated
follows the latter. They are read here (Thrift's compact protocol, of which PageHeader in
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift needs a little).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, BinaryIO

_USUAL_BYTES = 1 << 9
_HEADER_BYTES = 1 << 16  # of a page's header, with statistics; more is refused
_MOST_DEPTH = 16
_DICTIONARY = 2  # PageType.DICTIONARY_PAGE
_SIZES = {1: "type", 2: "uncompressed", 3: "compressed"}  # fields of a PageHeader
_BOOLEANS, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _MAP, _STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 11, 12


class PagesError(Exception):
    """Pages that cannot be read. The message says why."""


@dataclass(frozen=True)
class Pages:
    """The largest pages of a column's chunk, unpacked, in bytes. ``dictionary``: what each of its rows may be of."""

    data: int = 0
    dictionary: int = 0


def pages_of(file: BinaryIO, column: Any) -> Pages:
    """Return the largest pages of a chunk. ``column``: its metadata, as pyarrow has it.

    Raises: OSError. PagesError: a header is damaged.
    """
    start, begins = column.data_page_offset, column.dictionary_page_offset
    if column.has_dictionary_page and begins is not None and 0 < begins < start:
        start = begins
    at, stop = start, start + column.total_compressed_size
    data = dictionary = 0
    while at < stop:
        size, header = _header(file, at, stop)
        if header["compressed"] < 0 or header["uncompressed"] < 0:
            raise PagesError("a page has a negative size")
        if header["type"] == _DICTIONARY:
            dictionary = max(dictionary, header["uncompressed"])
        else:
            data = max(data, header["uncompressed"])
        at += size + header["compressed"]
    return Pages(data, dictionary)


def _header(file: BinaryIO, at: int, stop: int) -> tuple[int, dict[str, int]]:
    """Return (bytes, sizes and type) of the header of a page at a place. Raises: OSError. PagesError."""
    file.seek(at)
    data = file.read(min(_USUAL_BYTES, stop - at))
    try:
        reader = _Compact(data)
        found = reader.sizes()
    except PagesError:
        data += file.read(min(_HEADER_BYTES, stop - at) - len(data))
        reader = _Compact(data)
        found = reader.sizes()
    return reader.at, found


class _Compact:
    """Reads a structure of Thrift's compact protocol. ``at``: how far it has read."""

    def __init__(self, data: bytes):
        self._data, self.at = data, 0

    def sizes(self) -> dict[str, int]:
        """Return the sizes and the type of a page from its header. Raises PagesError."""
        found: dict[str, int] = {}
        number = 0
        while field := self._field():
            delta, kind = field
            number = number + delta if delta else self._signed()
            if number in _SIZES and kind in _INTEGERS:
                found[_SIZES[number]] = self._signed()
            else:
                self._skip(kind, 0)
        if len(found) < len(_SIZES):
            raise PagesError("a page's header is damaged")
        return found

    def _field(self) -> tuple[int, int] | None:
        """Return (difference to the last field's number, kind); None at the end of a structure."""
        byte = self._take(1)[0]
        return (byte >> 4, byte & 15) if byte else None

    def _take(self, size: int) -> bytes:
        found = self._data[self.at : self.at + size]
        if len(found) < size:
            raise PagesError("a page's header is damaged")
        self.at += size
        return found

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise PagesError("a page's header is damaged")

    def _signed(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)

    def _skip(self, kind: int, depth: int) -> None:
        if depth > _MOST_DEPTH:
            raise PagesError("a page's header is damaged")
        if kind in _BOOLEANS:
            return
        if kind == _BYTE:
            self._take(1)
        elif kind in _INTEGERS:
            self._varint()
        elif kind == _DOUBLE:
            self._take(8)
        elif kind == _BINARY:
            self._take(self._varint())
        elif kind in _LISTS:
            byte = self._take(1)[0]
            size, element = byte >> 4, byte & 15
            size = self._varint() if size == 15 else size
            for _ in range(min(size, len(self._data))):
                self._skip(_BYTE if element in _BOOLEANS else element, depth + 1)
        elif kind == _STRUCT:
            while field := self._field():
                if not field[0]:
                    self._signed()
                self._skip(field[1], depth + 1)
        else:
            raise PagesError("a page's header is damaged")
