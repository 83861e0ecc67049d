"""A file of pieces: tensors one after the other, each as ``torch.save`` writes it, and at the end their checksums.

torch's distributed checkpoints find a piece by its place in the file, and so never see what follows the last one: a
table of every piece's place, length and xxh3, then the number of pieces, a mark, and the table's own xxh3. With it
whoever reads a piece can tell whether it is what was written, without reading the file as a whole.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
import xxhash
from torch import Tensor

from dsv3_megatron.checkpoint.manifest import USE_OLDER, DamageError, damage_of
from dsv3_megatron.checkpoint.stored.saved_tensor import find_tensor
from dsv3_megatron.run.files import retried
from dsv3_megatron.run.handed import open_regular
from dsv3_megatron.run.made import new_file

_ROW = struct.Struct("<QQ16s")  # place, length, xxh3
_END = struct.Struct("<Q8s16s")  # pieces, mark, xxh3 of the table
_MARK = b"pieces01"


class ChecksummingFile:
    """A file that knows the checksum of what was written to it, in order; on the disk once closed without error."""

    def __init__(self, path: Path):
        self._file: BinaryIO = new_file(path)
        self._digest, self._position = xxhash.xxh3_128(), 0
        self.error: OSError | None = None  # what the disk said: torch.save reports it as "unexpected pos"

    def write(self, data: Any) -> int:
        """Append bytes."""
        data = memoryview(data).cast("B")
        self._digest.update(data)
        try:
            written = self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self._position += written
        return written

    def tell(self) -> int:
        """Return how many bytes were written."""
        return self._position

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        self._file.flush()

    def finish(self) -> dict[str, Any]:
        """Put the file on the disk, close it, and return its facts for the manifest."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self._position, "xxh3": self._digest.hexdigest()}

    def abandon(self) -> None:
        """Close a file that could not be written."""
        try:
            self._file.close()
        except OSError:  # what is buffered still does not fit
            return


def write_file(path: Path, data: bytes) -> dict[str, Any]:
    """Write one file and return its facts for the manifest."""
    file = ChecksummingFile(path)
    try:
        file.write(data)
        return file.finish()
    except BaseException:
        file.abandon()
        raise


class PieceFile(ChecksummingFile):
    """A file of pieces that is being written."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._rows: list[bytes] = []
        self._piece = xxhash.xxh3_128()

    def write(self, data: Any) -> int:
        """Append bytes."""
        self._piece.update(data)
        return super().write(data)

    def add(self, tensor: Tensor) -> tuple[int, int]:
        """Append a tensor in host memory; return its place and length. Raises OSError: what the disk said."""
        start = self.tell()
        self._piece.reset()
        # torch would save all memory that a view is a part of.
        whole = tensor.numel() * tensor.itemsize == tensor.untyped_storage().nbytes() and tensor.is_contiguous()
        try:
            torch.save(tensor if whole else tensor.clone(memory_format=torch.contiguous_format), cast(IO[bytes], self))
        except BaseException:
            if self.error is not None:
                raise self.error from None
            raise
        length = self.tell() - start
        self._rows.append(_ROW.pack(start, length, self._piece.digest()))
        return start, length

    def finish(self) -> dict[str, Any]:
        """Add the table, put the file on the disk, close it, and return its facts for the manifest."""
        table = b"".join(self._rows)
        self.write(table + _END.pack(len(self._rows), _MARK, xxhash.xxh3_128_digest(table)))
        return super().finish()


@contextmanager
def open_pieces(path: Path, *, checked: bool) -> Iterator[Callable[[int, int], Tensor]]:
    """Open a file of pieces; the block is given a function that returns the tensor at a place, of a length.

    What cannot be read is read again. ``checked``: the file has a table, and every piece is compared with it.
    Raises: DamageError: the file, or later a piece, is missing, cannot be read, or is not what was written.
    """
    with damage_of(path):
        file = retried(lambda: open_regular(path))
    with file:
        rows = _read_table(path, file) if checked else None

        def read(start: int, length: int) -> Tensor:
            for _ in range(2):  # what came over a network may be right the second time
                with damage_of(path):
                    data = retried(lambda: _read(file, start, length))
                if rows is None or rows.get((start, length)) == xxhash.xxh3_128_digest(data):
                    try:
                        return find_tensor(memoryview(data)).of(data)
                    except ValueError as error:
                        raise DamageError(
                            f"{path}: the piece at byte {start} cannot be read ({error}); {USE_OLDER}"
                        ) from None
            raise DamageError(f"{path} is not what was written, {length} bytes from byte {start} on; {USE_OLDER}")

        yield read


def _read_table(path: Path, file: BinaryIO) -> dict[tuple[int, int], bytes]:
    """Return (place, length) -> xxh3 of every piece."""
    with damage_of(path):
        size = retried(lambda: os.fstat(file.fileno()).st_size)
        end = retried(lambda: _read(file, size - _END.size, _END.size)) if size >= _END.size else b""
        count, mark, digest = _END.unpack(end) if end else (0, b"", b"")
        if mark != _MARK or _END.size + count * _ROW.size > size:
            raise DamageError(f"{path} does not end as it was written; {USE_OLDER}")
        table = retried(lambda: _read(file, size - _END.size - count * _ROW.size, count * _ROW.size))
        if xxhash.xxh3_128_digest(table) != digest:
            raise DamageError(f"{path} does not end as it was written; {USE_OLDER}")
    return {(start, length): xxh3 for start, length, xxh3 in _ROW.iter_unpack(table)}


def _read(file: BinaryIO, start: int, length: int) -> bytearray:
    """Return bytes of a file. Raises OSError: it is too short, or cannot be read."""
    found = bytearray(length)
    done, view = 0, memoryview(found)
    while done < length:
        more = os.preadv(file.fileno(), [view[done:]], start + done)
        if not more:
            raise OSError(None, f"only {start + done} bytes long")
        done += more
    return found
