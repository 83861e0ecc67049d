"""A tensor as ``torch.save`` writes it, found where it lies: no class that the file names is looked up.

The file is a zip of uncompressed records, of which ``data.pkl`` describes the tensor and ``data/0`` holds its numbers.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv3_megatron.checkpoint.stored.pickled import Record, read_pickle

DTYPES = {str(each): each for each in vars(torch).values() if isinstance(each, torch.dtype)}
_STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.HalfStorage": torch.float16,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
_UNTYPED = "torch.storage.UntypedStorage"  # of dtypes without a storage of their own, such as FP8's
_REBUILD = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
_NAMES = frozenset({*DTYPES, *_STORAGES, *_REBUILD, _UNTYPED, "collections.OrderedDict"})
_DESCRIPTION_BYTES = 1 << 22
_LOCAL_HEADER = 30  # bytes of it before its two names, whose lengths are the last four


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of a file: its first number is ``place`` bytes behind the file's beginning; ``strides`` in numbers."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    place: int
    span: int  # bytes from its first number to behind its last

    def of(self, data: bytearray) -> Tensor:
        """Return the tensor, in the memory of the file's content."""
        if not self.span:
            return torch.empty(self.shape, dtype=self.dtype)
        numbers = torch.frombuffer(data, dtype=torch.uint8, count=self.span, offset=self.place)
        if self.place % self.dtype.itemsize:
            numbers = numbers.clone()
        return numbers.view(self.dtype).as_strided(self.shape, self.strides)


def find_tensor(data: memoryview) -> SavedTensor:
    """Return where the tensor of a file lies. Raises: ValueError: ``torch.save`` writes no such file of a tensor."""
    content, records = read_description(data)
    if type(content) is not Record or content.name not in _REBUILD:
        raise ValueError("it holds no tensor")
    try:
        storage, offset, shape, strides, *_ = content.arguments
        kind, named, number, _, _ = storage.state
        if kind != "storage" or not all(_are_sizes(sizes) for sizes in (shape, strides, (offset,))):
            raise ValueError("it does not describe a tensor")
        dtype = DTYPES[content.arguments[6].name] if named.name == _UNTYPED else _STORAGES[named.name]
        first, size = records[f"data/{number}"]
    except (KeyError, TypeError, AttributeError, IndexError):
        raise ValueError("it does not describe a tensor") from None
    if len(shape) != len(strides):
        raise ValueError("it does not describe a tensor")
    reach = 0 if 0 in shape else 1 + sum((count - 1) * stride for count, stride in zip(shape, strides))
    if (offset + reach) * dtype.itemsize > size:
        raise ValueError(
            f"it has {size} bytes of numbers, and its tensor reaches to {(offset + reach) * dtype.itemsize}"
        )
    return SavedTensor(dtype, shape, strides, first + offset * dtype.itemsize, reach * dtype.itemsize)


def read_description(data: memoryview) -> tuple[Any, dict[str, tuple[int, int]]]:
    """Return what ``data.pkl`` of a file that ``torch.save`` wrote holds, as plain data, and the place and length of
    every record by its name. Raises: ValueError: it is no such file."""
    try:
        with zipfile.ZipFile(_Bytes(data)) as archive:
            records = {info.filename.partition("/")[2]: _record(data, info) for info in archive.infolist()}
    except (zipfile.BadZipFile, OSError, NotImplementedError):
        raise ValueError("it is no file that torch.save has written") from None
    first, size = records.get("data.pkl", (0, 0))
    if not 0 < size <= _DESCRIPTION_BYTES:
        raise ValueError("it is no file that torch.save has written")
    if "byteorder" in records and bytes(data[slice_of(*records["byteorder"])]) != b"little":
        raise ValueError("its numbers are of another byte order")
    return read_pickle(bytes(data[slice_of(first, size)]), _NAMES), records


def slice_of(first: int, size: int) -> slice:
    """Return a record's bytes as a slice of the file."""
    return slice(first, first + size)


def _record(data: memoryview, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Return place and length of a record."""
    header = bytes(data[info.header_offset : info.header_offset + _LOCAL_HEADER])
    names = int.from_bytes(header[-4:-2], "little") + int.from_bytes(header[-2:], "little")
    first = info.header_offset + _LOCAL_HEADER + names
    is_plain = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
    if not is_plain or header[:4] != b"PK\x03\x04" or first + info.file_size > len(data):
        raise ValueError("its records are compressed, or torn")
    return first, info.file_size


def _are_sizes(found: object) -> bool:
    return type(found) is tuple and all(type(size) is int and 0 <= size < 1 << 48 for size in found)


class _Bytes(io.RawIOBase):
    """Memory as a file, without a copy."""

    def __init__(self, data: memoryview):
        self._data, self._at = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        found = self._data[self._at : self._at + len(buffer)]
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)
