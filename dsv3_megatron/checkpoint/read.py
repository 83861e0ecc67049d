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

from dsv3_megatron.checkpoint.piece_files import open_pieces
from dsv3_megatron.pipeline.saved import Entry

_Reads = dict[str, dict[tuple[int, int], list[tuple[ReadItem, Tensor]]]]  # by file, and place and length in it


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
    for name, pieces in _reads(index, entries).items():
        with open_pieces(folder / name, checked=checked) as read:
            for place, wanted in sorted(pieces.items(), key=lambda piece: piece[0]):
                found = read(*place)
                for item, target in wanted:
                    _box(target, item.dest_offsets, item.lengths).copy_(_box(found, item.storage_offsets, item.lengths))


def _reads(index: Metadata, entries: Sequence[Entry]) -> _Reads:
    """Return what is to be read for the entries."""
    by_key: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_key[entry.key].append(entry)
    reads: _Reads = defaultdict(lambda: defaultdict(list))
    for key, boxes in by_key.items():
        targets = {entry.start: entry.tensor for entry in boxes}
        chunks = [ChunkStorageMetadata(torch.Size(entry.start), torch.Size(entry.extent)) for entry in boxes]
        covered = 0
        tensor = cast(TensorStorageMetadata, index.state_dict_metadata[key])
        for item in create_read_items_for_chunk_list(key, tensor, chunks):
            stored = index.storage_data[item.storage_index]
            target = targets[tuple(item.dest_index.offset or ())]
            reads[stored.relative_path][stored.offset, stored.length].append((item, target))
            covered += item.lengths.numel()
        assert covered == sum(entry.tensor.numel() for entry in boxes), f"{key} is not stored whole"
    return reads


def _box(tensor: Tensor, start: Sequence[int], extent: Sequence[int]) -> Tensor:
    for axis, (first, size) in enumerate(zip(start, extent)):
        tensor = tensor.narrow(axis, first, size)
    return tensor
