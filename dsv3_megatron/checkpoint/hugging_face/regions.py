"""Reading boxes of a checkpoint's tensors where they lie, without loading the tensors: memory is one box."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dsv3_megatron.checkpoint.boxes import Box, is_partition
from dsv3_megatron.checkpoint.index import read_index
from dsv3_megatron.checkpoint.manifest import DamageError, damage_of
from dsv3_megatron.checkpoint.stored.saved_tensor import find_tensor
from dsv3_megatron.run.handed import open_regular
from parallel.errors import CheckpointError


@dataclass(frozen=True)
class _Chunk:
    """A piece of a tensor as it lies in a file."""

    start: tuple[int, ...]
    extent: tuple[int, ...]
    dtype: torch.dtype
    file: str
    offset: int
    length: int


class Regions:
    """The tensors of a checkpoint, read box by box."""

    def __init__(self, checkpoint: Path):
        self._folder = checkpoint
        metadata = read_index(checkpoint)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._chunks: dict[str, list[_Chunk]] = {}
        self._corners: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # of all chunks: first, and behind the last
        self._maps: dict[str, mmap.mmap] = {}
        self._views: dict[_Chunk, tuple[np.ndarray, torch.dtype]] = {}
        stored = {(index.fqn, tuple(index.offset or ())): info for index, info in metadata.storage_data.items()}
        for key, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                continue
            self.shapes[key] = tuple(entry.size)
            dtype = entry.properties.dtype
            self._chunks[key] = [
                _Chunk(tuple(c.offsets), tuple(c.sizes), dtype, info.relative_path, info.offset, info.length)
                for c in entry.chunks
                for info in [stored[key, tuple(c.offsets)]]
            ]
            starts = np.array([chunk.start for chunk in self._chunks[key]])
            self._corners[key] = starts, starts + np.array([chunk.extent for chunk in self._chunks[key]])

    def read(self, key: str, start: tuple[int, ...], extent: tuple[int, ...]) -> Tensor:
        """Return a box of a tensor, copied, in the dtype it is stored in.

        Raises: CheckpointError: no such tensor, or the box is not covered by what is stored. DamageError: a piece is
        not what the index says.
        """
        if key not in self._chunks:
            raise CheckpointError(f"{self._folder} holds no tensor {key}; it is of another model")
        found: Tensor | None = None
        boxes: list[Box] = []
        starts, ends = self._corners[key]
        low, high = np.array(start), np.array(start) + np.array(extent)
        for number in np.flatnonzero(((starts < high) & (low < ends)).all(axis=1)):
            chunk = self._chunks[key][number]
            first, last = np.maximum(low, starts[number]), np.minimum(high, ends[number])
            piece = self._piece(chunk, _slices(first - starts[number], last - starts[number]))
            if found is None:
                found = torch.empty(extent, dtype=piece.dtype)
            found[_slices(first - low, last - low)] = piece
            boxes.append(Box(tuple(first), tuple(last - first)))
        if found is None or not is_partition(boxes, found.numel()):
            raise CheckpointError(f"{self._folder}: {key} from {start} by {extent} is not stored whole")
        return found

    def _piece(self, chunk: _Chunk, box: tuple[slice, ...]) -> Tensor:
        """Return a copy of a box of a chunk."""
        if chunk not in self._views:
            self._views[chunk] = self._view(chunk)
        numbers, dtype = self._views[chunk]
        return torch.from_numpy(np.array(numbers[box])).view(dtype).squeeze(-1)

    def _view(self, chunk: _Chunk) -> tuple[np.ndarray, torch.dtype]:
        """Return a chunk's bytes [..., bytes of a number] where they lie, and its dtype."""
        path = self._folder / chunk.file
        with damage_of(path):
            if chunk.file not in self._maps:
                with open_regular(path) as file:
                    self._maps[chunk.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        data = memoryview(self._maps[chunk.file])[chunk.offset : chunk.offset + chunk.length]
        try:
            found = find_tensor(data)
            if found.shape != chunk.extent or found.dtype != chunk.dtype:
                raise ValueError(f"it is {found.dtype} of {found.shape}, not {chunk.dtype} of {chunk.extent}")
        except ValueError as error:
            raise DamageError(f"{path}: the piece at byte {chunk.offset} cannot be read ({error})") from None
        size = found.dtype.itemsize
        raw = np.frombuffer(data, np.uint8, found.span, found.place)
        strides = tuple(stride * size for stride in found.strides)
        view = np.lib.stride_tricks.as_strided(raw, (*found.shape, size), (*strides, 1), writeable=False)
        return view, found.dtype


def _slices(first: np.ndarray, behind: np.ndarray) -> tuple[slice, ...]:
    return tuple(slice(int(a), int(b)) for a, b in zip(first, behind))
