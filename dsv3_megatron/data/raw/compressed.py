"""The content of a file, unpacked on the way: gzip, Zstandard, bzip2 and xz, with several members in a row.

Zero bytes between members and after the last are padding of tapes and archives, and no damage.
"""

from __future__ import annotations

import bz2
import lzma
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dsv3_megatron.data.raw.inputs import InputFile

_READ_BYTES = 1 << 18
_HEAD_BYTES = 64
_BEGINNINGS = (  # of files: what they are called in messages, the suffix that they should have, how they begin
    ("gzip", ".gz", re.compile(rb"\x1f\x8b\x08")),
    ("Zstandard", ".zst", re.compile(rb"\x28\xb5\x2f\xfd")),
    ("xz", ".xz", re.compile(rb"\xfd7zXZ\x00")),
    ("bzip2", ".bz2", re.compile(rb"BZh.(?:1AY&SY|\x17rE8P\x90)", re.DOTALL)),  # a text may begin with BZh alone
    ("a zip archive", None, re.compile(rb"PK\x03\x04")),
    ("Parquet", ".parquet", re.compile(rb"PAR1")),
)


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


class MisnamedError(TornError):
    """A file whose content, by how it begins, is not what its name says."""


def chunks(file: InputFile, disk: int = 0) -> Iterator[Chunk]:
    """Yield the content of a file from a place on disk where a member of it begins (any place, if not compressed).

    Raises: TornError: after what could be read. MisnamedError: from the beginning of a file.
    """
    try:
        yield from (_unpacked(file, disk) if file.compressed else _plain(file, disk))
    except OSError as error:
        raise TornError(error.strerror or str(error), disk) from None


def content(file: InputFile) -> bytes:
    """Return all of it. Raises: TornError."""
    return b"".join(chunk.data for chunk in chunks(file))


def _begin(opened: BinaryIO, file: InputFile, disk: int) -> None:
    """Go to a place on disk. Raises: MisnamedError."""
    if not disk:
        _check_name(file, opened.read(_HEAD_BYTES))
    opened.seek(disk)


def _check_name(file: InputFile, head: bytes) -> None:
    suffix = Path(file.path).suffix.lower()
    named = next((name for name, its, _ in _BEGINNINGS if its == suffix), None)
    head = head.lstrip(b"\0") if named else head
    for name, its, begins in _BEGINNINGS:
        if begins.match(head):
            if name != named:
                what = f"name it ..{its}" if its else "unpack it"
                raise MisnamedError(f"is {name} by its content; {what}", 0)
            return
    if named and head and suffix != ".zst":  # which may begin with a frame to be skipped
        raise MisnamedError(f"is not {named}, as its name says; rename it", 0)


def _plain(file: InputFile, disk: int) -> Iterator[Chunk]:
    with open(file.path, "rb") as opened:
        _begin(opened, file, disk)
        while data := opened.read(_READ_BYTES):
            yield Chunk(data, disk + len(data), disk)
            disk += len(data)


def _unpacked(file: InputFile, disk: int) -> Iterator[Chunk]:
    suffix = Path(file.path).suffix.lower()
    useful = disk  # what was read up to here gave content
    with open(file.path, "rb") as opened:
        _begin(opened, file, disk)
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
