"""Checksums of the blocks of a file: whatever part of it is read, the blocks around it are compared first.

A run reads a shard at random places, a few kilobytes at a time. To compare whole files (the SHA-256 in the table of
shards) would mean to read a corpus once more at every start, or to trust a note that it was whole some time ago; it
would find damage minutes after it was trained on, and none that comes later. To compare a block of 64 KiB takes 4 us,
in the thread that reads ahead, at every read, and nothing has to be remembered. A network file system moves about that
much for any read.

The checksum is XXH3 (64 bits), as for the pieces of checkpoints: it finds damage, and is no signature. Who wants to
know that a folder is the one that somebody vouches for compares its SHA-256 (launcher/data.py check).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from dsv3_megatron.data.source.open_files import OpenFiles

BLOCK_BYTES = 1 << 16
_VERSION = 1
_SUM = np.dtype("<u8")
_HEAD = struct.Struct("<8sIIQ")  # mark, version, bytes of a block, XXH3 of the sums
_MARK = b"dsv3sums"
_READ_BYTES = 1 << 20


class DamagedError(Exception):
    """Bytes that do not have their checksum. The message names them."""


class BlockSums:
    """The checksums of bytes that come piece by piece."""

    def __init__(self) -> None:
        self._sums: list[int] = []
        self._block, self._room = xxhash.xxh3_64(), BLOCK_BYTES

    def add(self, data: bytes | memoryview) -> None:
        """Take the bytes that follow."""
        left = memoryview(data)
        while len(left) >= self._room:
            self._block.update(left[: self._room])
            left = left[self._room :]
            self._sums.append(self._block.intdigest())
            self._block, self._room = xxhash.xxh3_64(), BLOCK_BYTES
        if len(left):
            self._block.update(left)
            self._room -= len(left)

    def content(self) -> bytes:
        """Return the checksums as they lie in a file; of the last block too, which may be shorter."""
        last = [self._block.intdigest()] if self._room < BLOCK_BYTES else []
        sums = np.asarray([*self._sums, *last], dtype=_SUM).tobytes()
        return _HEAD.pack(_MARK, _VERSION, BLOCK_BYTES, xxhash.xxh3_64_intdigest(sums)) + sums


def sums_bytes(size: int) -> int:
    """Return how long the checksums of a file of ``size`` bytes are."""
    return _HEAD.size + -(-size // BLOCK_BYTES) * _SUM.itemsize


def parse_sums(content: bytes, size: int) -> np.ndarray:
    """Return the checksums [blocks] uint64 of a file of ``size`` bytes. Raises DamagedError: they are not that."""
    sums = content[_HEAD.size :]
    if len(content) != sums_bytes(size):
        raise DamagedError(f"it has {len(content):,} bytes, not {sums_bytes(size):,}")
    if _HEAD.unpack(content[: _HEAD.size]) != (_MARK, _VERSION, BLOCK_BYTES, xxhash.xxh3_64_intdigest(sums)):
        raise DamagedError("it is damaged")
    return np.frombuffer(sums, dtype=_SUM)


def read_checked(files: OpenFiles, path: str, size: int, place: int, sums: np.ndarray, end: int) -> bytes:
    """Return ``size`` bytes of a file from ``place`` on, fewer where they would go beyond ``end``.

    Args:
        sums, end: of the first ``end`` bytes of the file, which are all that is read.
    Raises: OSError: it cannot be read. DamagedError: it is cut, or a block does not have its checksum.
    """
    first = place // BLOCK_BYTES
    begin, stop = first * BLOCK_BYTES, min(end, -(-(place + size) // BLOCK_BYTES) * BLOCK_BYTES)
    if size < 1 or place >= end:
        return b""
    data = files.read(path, stop - begin, begin)
    if len(data) < stop - begin:
        raise DamagedError(f"it ends at byte {begin + len(data):,}")
    _compare(data, begin, sums)
    return data[place - begin :][:size]


def verify(file: BinaryIO, sums: np.ndarray, end: int) -> None:
    """Read the first ``end`` bytes of a file, opened at its beginning, and compare them.

    Raises: OSError: it cannot be read. DamagedError: they are fewer, or other than they were.
    """
    at = 0
    while at < end:
        data = file.read(min(_READ_BYTES, end - at))
        if not data:
            raise DamagedError(f"it ends after {at:,} of {end:,} bytes")
        _compare(data, at, sums)
        at += len(data)


def sums_of(path: Path) -> bytes:
    """Return the checksums of a file's content, as they lie in a file. Raises OSError."""
    sums = BlockSums()
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            sums.add(data)
    return sums.content()


def _compare(data: bytes, begin: int, sums: np.ndarray) -> None:
    """Raise DamagedError where a block of ``data``, which begins at byte ``begin`` of its file, is not as it was."""
    view, first = memoryview(data), begin // BLOCK_BYTES
    for number, at in enumerate(range(0, len(view), BLOCK_BYTES), first):
        block = view[at : at + BLOCK_BYTES]
        if xxhash.xxh3_64_intdigest(block) != int(sums[number]):
            raise DamagedError(
                f"bytes {begin + at:,} to {begin + at + len(block):,} have another checksum than when they were written"
            )
