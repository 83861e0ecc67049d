"""Where every piece of a checkpoint lies: ``.metadata``, as torch's distributed checkpoints have it.

Rank 0 alone writes and reads it. What it says grows with the number of ranks, so when a run starts every rank is given
no more of it than is about its own stages.
"""

from __future__ import annotations

import gc
import pickle
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from dsv3_megatron.checkpoint.manifest import USE_OLDER, DamageError, damage_of, read_content
from dsv3_megatron.checkpoint.stored.metadata import metadata_of
from dsv3_megatron.megatron.host import adapt_host
from dsv3_megatron.run.files import retried
from dsv3_megatron.run.handed import read_bytes
from parallel.agree import agreed

adapt_host()

from megatron.core import parallel_state

INDEX = ".metadata"  # torch's name for it
MOST_BYTES = 1 << 30  # of it; that of 671 billion parameters on 2,048 ranks has a twentieth
_LEAST_BYTES = 1 << 16
Places = dict[str, list[tuple[int, int]]]  # file -> place and length of every piece


@dataclass(frozen=True)
class Described:
    """A box of a tensor as it is stored."""

    key: str
    whole: tuple[int, ...]
    start: tuple[int, ...]
    extent: tuple[int, ...]
    dtype: torch.dtype


class Index:
    """Where every box of a checkpoint lies, on rank 0: the content of ``.metadata``, made once where it is the same."""

    def __init__(self) -> None:
        self._boxes: dict[str, list[Described]] = {}  # by file
        self._places: Places = {}
        self._stored: bytes | None = None

    def describe(self, boxes: dict[str, list[Described]]) -> None:
        """Take over which boxes the files hold, of all ranks. Raises AssertionError where tensors have gaps."""
        check_whole(boxes)
        self._boxes, self._places, self._stored = boxes, {}, None

    def place(self, places: Places) -> None:
        """Take over where pieces lie, of the files that say so."""
        if any(self._places.get(name) != found for name, found in places.items()):
            self._places.update(places)
            self._stored = None

    def stored(self) -> bytes:
        """Return ``.metadata``, as torch's distributed checkpoints have it."""
        if self._stored is None:
            self._stored = pickle.dumps(describe_pieces(self._boxes, self._places))
        return self._stored


def check_whole(boxes: dict[str, list[Described]]) -> None:
    """Raise AssertionError where the boxes of all files do not make whole tensors."""
    numbers: dict[str, int] = {}
    wholes = {box.key: box.whole for each in boxes.values() for box in each}
    for box in (box for each in boxes.values() for box in each):
        numbers[box.key] = numbers.get(box.key, 0) + torch.Size(box.extent).numel()
    torn = [key for key, whole in wholes.items() if numbers[key] != torch.Size(whole).numel()]
    assert not torn, f"{len(torn)} tensors would not be saved whole, {torn[0]} for one"


def describe_pieces(boxes: dict[str, list[Described]], places: Places) -> Metadata:
    """Return what torch's distributed checkpoints want to know of boxes [file][piece] and their places."""
    tensors: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for name, each in boxes.items():
        for box, (start, length) in zip(each, places[name], strict=True):
            tensor = tensors.get(box.key)
            if tensor is None:
                tensor = TensorStorageMetadata(TensorProperties(box.dtype), torch.Size(box.whole), [])
                tensors[box.key] = tensor
            corner = torch.Size(box.start)
            tensor.chunks.append(ChunkStorageMetadata(corner, torch.Size(box.extent)))
            storage[MetadataIndex(box.key, corner)] = _StorageInfo(name, start, length)
    return Metadata(state_dict_metadata={**tensors}, storage_data=storage)


# Of every tensor: its shape and boxes, and where each box lies.
_Part = dict[str, tuple[STORAGE_TYPES, dict[MetadataIndex, _StorageInfo]]]


def index_of(checkpoint: Path, keys: Collection[str]) -> Metadata:
    """Return what a checkpoint's index says of these tensors. All ranks together; read from the disk once, by rank 0.

    Ranks ask along the axes of the layout, data-parallel first, and are answered the same way back: each is given what
    it has asked for, and hands on what ranks behind it have.
    Raises: DamageError: it cannot be read.
    """
    whole: _Part = {}
    with agreed(any_counts=True):
        if dist.get_rank() == 0:
            whole = _by_tensor(read_index(checkpoint))
    # megatron-core's global state: the groups of a mirrored pipeline have two pipeline ranks in one data-parallel
    # group, of which only one is the first.
    data = parallel_state.get_data_parallel_group(with_context_parallel=True)
    axes = (data, parallel_state.get_tensor_model_parallel_group(), parallel_state.get_pipeline_model_parallel_group())
    part = _ask(whole, set(keys), [axis for axis in axes if axis.size() > 1])
    places = {box: place for _, boxes in part.values() for box, place in boxes.items()}
    return Metadata(state_dict_metadata={key: tensor for key, (tensor, _) in part.items()}, storage_data=places)


def _ask(whole: _Part, keys: set[str], axes: Sequence[dist.ProcessGroup]) -> _Part:
    """Return the part of ``whole``, on rank 0, that is about these tensors."""
    if not axes:
        return {key: whole[key] for key in keys & whole.keys()}
    axis, *others = axes
    first = axis.rank() == 0
    asked: list[Any] | None = [None] * axis.size() if first else None
    dist.gather_object(keys, asked, group=axis, group_dst=0)
    answers: list[_Part] | None = None
    if asked is not None:
        known = _ask(whole, set().union(*asked), others)
        answers = [{key: known[key] for key in each & known.keys()} for each in asked]
    answer: list[Any] = [None]
    dist.scatter_object_list(answer, answers, group=axis, group_src=0)
    return answer[0]


def _by_tensor(index: Metadata) -> _Part:
    """Return an index by tensor."""
    part: _Part = {key: (tensor, {}) for key, tensor in index.state_dict_metadata.items()}
    for box, place in index.storage_data.items():
        part[box.fqn][1][box] = place
    return part


def read_index(checkpoint: Path) -> Metadata:
    """Return what a checkpoint's index says, its types and places checked against the manifest.

    The file is a pickle, and read as data: what it names is not called. Kept of it are the tensors and their pieces.
    Raises: DamageError: it cannot be read, is not what was written, or describes what the files do not hold.
    """
    path, files = checkpoint / INDEX, read_content(checkpoint)["files"]
    size, described = files[INDEX]["bytes"], sum(facts["bytes"] for facts in files.values())
    try:
        if size > min(MOST_BYTES, described - size + _LEAST_BYTES):  # a piece is longer than what is said of it
            raise ValueError(f"it has {size:,} bytes, of {described - size:,} that it describes")
        with damage_of(path):
            stored = retried(lambda: read_bytes(path, size))
        if xxhash.xxh3_128_hexdigest(stored) != files[INDEX]["xxh3"]:
            raise ValueError("it is not what was written")
        with _without_collections():  # which look at every object so far again and again: three quarters of the time
            return metadata_of(stored, files)
    except ValueError as error:
        raise DamageError(f"{path} cannot be read ({error}); {USE_OLDER}") from None


@contextmanager
def _without_collections() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
