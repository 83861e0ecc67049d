"""Reading boxes of a checkpoint's tensors where they lie, without loading the tensors: memory is one box."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from parallel.errors import CheckpointError


@dataclass(frozen=True)
class _Chunk:
    """A piece of a tensor as it lies in a file."""

    start: tuple[int, ...]
    extent: tuple[int, ...]
    file: str
    offset: int
    length: int


class Regions:
    """The tensors of a checkpoint, read box by box."""

    def __init__(self, checkpoint: Path):
        self._folder = checkpoint
        metadata = FileSystemReader(str(checkpoint)).read_metadata()
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
            self._chunks[key] = [
                _Chunk(tuple(c.offsets), tuple(c.sizes), info.relative_path, info.offset, info.length)
                for c in entry.chunks
                for info in [stored[key, tuple(c.offsets)]]
            ]
            starts = np.array([chunk.start for chunk in self._chunks[key]])
            self._corners[key] = starts, starts + np.array([chunk.extent for chunk in self._chunks[key]])

    def read(self, key: str, start: tuple[int, ...], extent: tuple[int, ...]) -> Tensor:
        """Return a box of a tensor, copied, in the dtype it is stored in.

        Raises: CheckpointError: no such tensor, or the box is not covered by what is stored.
        """
        if key not in self._chunks:
            raise CheckpointError(f"{self._folder} holds no tensor {key}; it is of another model")
        found: Tensor | None = None
        missing = int(np.prod(extent))
        starts, ends = self._corners[key]
        low, high = np.array(start), np.array(start) + np.array(extent)
        for number in np.flatnonzero(((starts < high) & (low < ends)).all(axis=1)):
            chunk = self._chunks[key][number]
            first, last = np.maximum(low, starts[number]), np.minimum(high, ends[number])
            piece = self._piece(chunk, _slices(first - starts[number], last - starts[number]))
            if found is None:
                found = torch.empty(extent, dtype=piece.dtype)
            found[_slices(first - low, last - low)] = piece
            missing -= piece.numel()
        if missing or found is None:
            raise CheckpointError(f"{self._folder}: {key} from {start} by {extent} is not stored whole")
        return found

    def _piece(self, chunk: _Chunk, box: tuple[slice, ...]) -> Tensor:
        """Return a copy of a box of a chunk."""
        if chunk not in self._views:
            self._views[chunk] = self._view(chunk)
        numbers, dtype = self._views[chunk]
        return torch.from_numpy(np.array(numbers[box])).view(dtype).squeeze(-1)

    def _view(self, chunk: _Chunk) -> tuple[np.ndarray, torch.dtype]:
        """Return a chunk's bytes [..., bytes of a number] where they lie, and its dtype. torch tells where in the file
        a saved tensor's numbers begin."""
        path = self._folder / chunk.file
        with path.open("rb") as file:
            view = _create_file_view(file, chunk.offset, chunk.length)
            described = torch.load(cast(IO[bytes], view), map_location="meta", weights_only=True)
            if chunk.file not in self._maps:
                self._maps[chunk.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        size, storage = described.itemsize, described.untyped_storage()
        raw = np.frombuffer(
            self._maps[chunk.file], np.uint8, storage.nbytes(), chunk.offset + storage._checkpoint_offset
        )
        raw = raw[described.storage_offset() * size :]
        strides = tuple(s * size for s in described.stride())
        shape = (*described.shape, size)
        return np.lib.stride_tricks.as_strided(raw, shape, (*strides, 1), writeable=False), described.dtype


def _slices(first: np.ndarray, behind: np.ndarray) -> tuple[slice, ...]:
    return tuple(slice(int(a), int(b)) for a, b in zip(first, behind))
