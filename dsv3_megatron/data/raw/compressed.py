"""The content of a file, unpacked on the way: gzip, Zstandard, bzip2 and xz, with several members in a row.

Zero bytes between members and after the last are padding of tapes and archives, and no damage.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_megatron.data.raw.inputs import InputFile

_READ_BYTES = 1 << 18
_GZIP, _ZSTANDARD, _BZIP2, _XZ = ("gzip", ".gz"), ("Zstandard", ".zst"), ("bzip2", ".bz2"), ("xz", ".xz")
_BEGINNINGS = {  # how files begin: their name in messages, the suffix that they should have
    b"\x1f\x8b\x08": _GZIP,
    b"\x28\xb5\x2f\xfd": _ZSTANDARD,
    b"\xfd7zXZ\x00": _XZ,
    b"BZh": _BZIP2,
    b"PK\x03\x04": ("a zip archive", ""),
    b"PAR1": ("Parquet", ".parquet"),
}


@dataclass(frozen=True)
class Place:
    """Where the reading of a file can begin without what lies before.

    Args:
        disk: bytes of the file before it.
        content: bytes of its content, unpacked, before it.
        lines: line breaks in them.
    """

    disk: int = 0
    content: int = 0
    lines: int = 0


@dataclass(frozen=True)
class Chunk:
    """Some content.

    Args:
        disk: bytes of the file that were read for everything up to its end.
        member: where on disk a new reading could begin with this chunk; None = nowhere.
    """

    data: bytes
    disk: int
    member: int | None


class TornError(Exception):
    """A file that cannot be read on: damaged, or cut short. ``disk``: where on disk what cannot be read begins."""

    def __init__(self, why: str, disk: int):
        super().__init__(why)
        self.disk = disk


def chunks(file: InputFile, disk: int = 0) -> Iterator[Chunk]:
    """Yield the content of a file from a place on disk where a member of it begins (any place, if not compressed).

    Raises: TornError: after what could be read.
    """
    try:
        yield from (_unpacked(file, disk) if file.compressed else _plain(file, disk))
    except OSError as error:
        raise TornError(error.strerror or str(error), disk) from None


def misnamed(file: InputFile) -> str | None:
    """Return why a file of rows or text cannot be what its name says, by how it begins; None where it may be.

    Raises: OSError.
    """
    with open(file.path, "rb") as opened:
        head = opened.read(64)
    suffix = Path(file.path).suffix.lower()
    named = next((kind for kind in (_GZIP, _ZSTANDARD, _BZIP2, _XZ) if kind[1] == suffix), None)
    head = head.lstrip(b"\0") if named else head
    found = next((kind for beginning, kind in _BEGINNINGS.items() if head.startswith(beginning)), None)
    if found == _BZIP2 and head[4:10] != b"1AY&SY" and head[4:10] != b"\x17\x72\x45\x38\x50\x90":
        found = None  # a text may begin so
    if found is not None and found != named:
        return f"is {found[0]} by its content; " + (f"name it ..{found[1]}" if found[1] else "unpack it")
    if named and head and found is None and named != _ZSTANDARD:  # which may begin with a frame to be skipped
        return f"is not {named[0]}, as its name says; rename it"
    return None


def content(file: InputFile) -> bytes:
    """Return all of it. Raises: TornError."""
    return b"".join(chunk.data for chunk in chunks(file))


def _plain(file: InputFile, disk: int) -> Iterator[Chunk]:
    with open(file.path, "rb") as opened:
        opened.seek(disk)
        while data := opened.read(_READ_BYTES):
            yield Chunk(data, disk + len(data), disk)
            disk += len(data)


def _unpacked(file: InputFile, disk: int) -> Iterator[Chunk]:
    suffix = Path(file.path).suffix.lower()
    useful = disk  # what was read up to here gave content
    with open(file.path, "rb") as opened:
        opened.seek(disk)
        unpacker: Any = None
        while raw := opened.read(_READ_BYTES):
            end = disk + len(raw)
            while raw:
                member = None
                if unpacker is None:
                    if not (raw := raw.lstrip(b"\0")):
                        break
                    unpacker, member = _unpacker(suffix), end - len(raw)
                try:
                    data = unpacker.decompress(raw)
                except Exception as error:  # zlib.error, OSError of bz2, lzma.LZMAError, zstandard.ZstdError
                    said = f"{error}".strip() or type(error).__name__
                    raise TornError(f"damaged ({said})", useful) from None
                raw = unpacker.unused_data if unpacker.eof else b""
                unpacker = None if unpacker.eof else unpacker
                useful = end - len(raw) if data else useful
                yield Chunk(data, end - len(raw), member)
            disk = end
        if unpacker is not None:
            raise TornError("cut short: its last compressed stream has no end", useful)


def _unpacker(suffix: str) -> object:
    if suffix == ".gz":
        return zlib.decompressobj(wbits=31)
    if suffix == ".bz2":
        return bz2.BZ2Decompressor()
    if suffix == ".xz":
        return lzma.LZMADecompressor(format=lzma.FORMAT_XZ)
    import zstandard  # for Zstandard input alone

    return zstandard.ZstdDecompressor().decompressobj()
