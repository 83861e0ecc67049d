"""Filling of boxes of tensors from a checkpoint, whatever boxes it was written in. Local: no collective is called."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from dsv3_megatron.checkpoint.boxes import Box, is_partition
from dsv3_megatron.checkpoint.manifest import USE_OLDER, DamageError
from dsv3_megatron.checkpoint.piece_files import open_pieces
from dsv3_megatron.pipeline.saved import Entry

_Wanted = tuple[ReadItem, Tensor, ChunkStorageMetadata, torch.dtype]  # the piece as the index describes it
_Reads = dict[str, dict[tuple[int, int], list[_Wanted]]]  # by file, and place and length in it


def misfit(index: Metadata, entries: Sequence[Entry]) -> str | None:
    """Return the first tensor that a checkpoint lacks or has in another shape; None where it has all."""
    stored = index.state_dict_metadata
    if missing := sorted({entry.key for entry in entries} - stored.keys()):
        return f"it holds no {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
    for entry in entries:
        size = tuple(getattr(stored[entry.key], "size", ()))  # bytes have none
        if size != entry.whole:
            return f"{entry.key} has shape {size}, not {entry.whole}"
    return None


@torch.no_grad()
def read_entries(folder: Path, index: Metadata, entries: Sequence[Entry], *, checked: bool) -> None:
    """Fill the boxes from a checkpoint that has their tensors (:func:`misfit`).

    A piece is read once and whole, and compared with its checksum where the files have any (``checked``).
    Raises: DamageError: a file is missing, cannot be read, or is not what was written.
    """
    for name, pieces in _reads(folder, index, entries).items():
        with open_pieces(folder / name, checked=checked) as read:
            for place, wanted in sorted(pieces.items(), key=lambda piece: piece[0]):
                found = read(*place)
                for item, target, chunk, dtype in wanted:
                    if found.shape != chunk.sizes or found.dtype != dtype:
                        raise DamageError(
                            f"{folder / name} has {found.dtype} of {tuple(found.shape)} where its index says {dtype} "
                            f"of {tuple(chunk.sizes)}; {USE_OLDER}"
                        )
                    _box(target, item.dest_offsets, item.lengths).copy_(_box(found, item.storage_offsets, item.lengths))


def _reads(folder: Path, index: Metadata, entries: Sequence[Entry]) -> _Reads:
    """Return what is to be read for the entries. Raises: DamageError: pieces overlap, and so leave gaps."""
    by_key: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_key[entry.key].append(entry)
    reads: _Reads = defaultdict(lambda: defaultdict(list))
    for key, boxes in by_key.items():
        targets = {entry.start: entry.tensor for entry in boxes}
        chunks = [ChunkStorageMetadata(torch.Size(entry.start), torch.Size(entry.extent)) for entry in boxes]
        filled: dict[tuple[int, ...], list[Box]] = defaultdict(list)  # of each target, by its corner
        tensor = cast(TensorStorageMetadata, index.state_dict_metadata[key])
        pieces: dict[torch.Size | None, ChunkStorageMetadata] = {chunk.offsets: chunk for chunk in tensor.chunks}
        for item in create_read_items_for_chunk_list(key, tensor, chunks):
            stored = index.storage_data[item.storage_index]
            corner = tuple(item.dest_index.offset or ())
            wanted = item, targets[corner], pieces[item.storage_index.offset], tensor.properties.dtype
            reads[stored.relative_path][stored.offset, stored.length].append(wanted)
            filled[corner].append(Box(tuple(item.dest_offsets), tuple(item.lengths)))
        for corner, target in targets.items():
            if not is_partition(filled[corner], target.numel()):
                raise DamageError(f"{folder}: {key} is not stored whole; {USE_OLDER}")
    return reads


def _box(tensor: Tensor, start: Sequence[int], extent: Sequence[int]) -> Tensor:
    for axis, (first, size) in enumerate(zip(start, extent)):
        tensor = tensor.narrow(axis, first, size)
    return tensor
