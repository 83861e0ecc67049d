"""The content of a file, unpacked on the way: gzip, Zstandard, bzip2 and xz, with several members in a row.

Zero bytes between members and after the last are padding of tapes and archives, and no damage. However much a few bytes
stand for, it comes in chunks of a few megabytes, and a stream that asks for very much memory is refused.
"""

from __future__ import annotations

import bz2
import lzma
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from dsv3_megatron.data.raw.inputs import InputFile

_READ_BYTES = 1 << 16
_HEAD_BYTES = 64
_CHUNK_BYTES = 4 << 20  # of content, at most; of Zstandard twice that, for its library has no such limit
_ZSTD_READ_BYTES = 1 << 7  # a block of four bytes can make 128 KiB: at most a chunk
_ZSTD_WINDOW = 1 << 27  # what zstd itself unpacks without --long=31
_XZ_MEMORY = 512 << 20  # xz -9 asks for 65 MiB
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
    useful = reached = disk  # what was read up to there gave content; what was read for the last chunk
    with open(file.path, "rb") as opened:
        _begin(opened, file, disk)
        unpacker: _Unpacker | None = None
        while raw := opened.read(_READ_BYTES):
            end = disk + len(raw)
            while raw or (unpacker is not None and unpacker.waits):
                member = None
                if unpacker is None:
                    if raw == bytes(len(raw)):  # gigabytes of it, perhaps: lstrip looks at one byte at a time
                        break
                    raw = raw.lstrip(b"\0")
                    unpacker, member = _unpacker(suffix), end - len(raw)
                try:
                    data, raw = unpacker.unpack(raw)
                except Exception as error:  # zlib.error, OSError of bz2, lzma.LZMAError, zstandard.ZstdError
                    said = f"{error}".strip() or type(error).__name__
                    raise TornError(f"damaged ({said})", useful) from None
                unpacker = None if unpacker.eof else unpacker
                useful = end - len(raw) if data else useful
                # what it was given, and still makes content of, has not been read
                reached = max(reached, disk if unpacker is not None and unpacker.waits else end - len(raw))
                yield Chunk(data, reached, member)
            disk = end
        if unpacker is not None:
            raise TornError("cut short: its last compressed stream has no end", useful)


class _Unpacker(Protocol):
    """One compressed stream."""

    @property
    def eof(self) -> bool:
        """Whether it has ended."""

    @property
    def waits(self) -> bool:
        """Whether there is more content in what it was given."""

    def unpack(self, raw: bytes) -> tuple[bytes, bytes]:
        """Return (some content, what of ``raw`` was not taken: to be given next, or what follows the end)."""


def _unpacker(suffix: str) -> _Unpacker:
    if suffix == ".gz":
        return _Gzip()
    if suffix == ".bz2":
        return _Keeping(bz2.BZ2Decompressor())
    if suffix == ".xz":
        return _Keeping(lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_XZ_MEMORY))
    return _Zstandard()


class _Gzip:
    def __init__(self) -> None:
        self._stream = zlib.decompressobj(wbits=31)
        self.waits = False

    @property
    def eof(self) -> bool:
        return self._stream.eof

    def unpack(self, raw: bytes) -> tuple[bytes, bytes]:
        data = self._stream.decompress(raw, _CHUNK_BYTES)
        self.waits = len(data) == _CHUNK_BYTES and not self.eof
        return data, self._stream.unused_data if self.eof else self._stream.unconsumed_tail


class _Keeping:
    """bzip2 or xz, which keep what they were given and have not unpacked."""

    def __init__(self, stream: bz2.BZ2Decompressor | lzma.LZMADecompressor):
        self._stream = stream

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def waits(self) -> bool:
        return not self._stream.eof and not self._stream.needs_input

    def unpack(self, raw: bytes) -> tuple[bytes, bytes]:
        data = self._stream.decompress(raw, _CHUNK_BYTES)
        return data, self._stream.unused_data if self.eof else b""


class _Zstandard:
    waits = False

    def __init__(self) -> None:
        import zstandard  # for Zstandard input alone

        self._stream = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()

    @property
    def eof(self) -> bool:
        return bool(self._stream.eof)

    def unpack(self, raw: bytes) -> tuple[bytes, bytes]:
        view, at, found, size = memoryview(raw), 0, [], 0
        while at < len(raw) and size < _CHUNK_BYTES and not self.eof:
            found.append(self._stream.decompress(view[at : at + _ZSTD_READ_BYTES]))
            size += len(found[-1])
            at += _ZSTD_READ_BYTES
        return b"".join(found), (self._stream.unused_data if self.eof else b"") + raw[at:]
