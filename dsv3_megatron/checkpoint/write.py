"""Writing of a rank's share of a checkpoint, and of what describes the whole.

What a rank writes follows from the layout alone: where it is, is gathered on rank 0 once, with the first save of a run.
Later saves gather no more than the names and checksums of files. Writing is local and calls no collective, so that it
may run in a thread and may fail.

The files are those of torch's distributed checkpoints (and megatron-core's: ``metadata.json``, ``common.pt``), so that
their tools read them: one file a rank for weights, one for the optimizer's states, and one for each extra state,
because who wants weights should not have to read seven times as much.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor

from dsv3_megatron.checkpoint.index import INDEX, Described, Places
from dsv3_megatron.checkpoint.manifest import FileFacts
from dsv3_megatron.checkpoint.piece_files import PieceFile, write_file
from dsv3_megatron.pipeline.saved import Entry

COMMON = "common.pt"  # megatron-core's name for what is no tensor
_BLOCK = 1 << 28  # bytes of host memory taken at a time: page-locked memory comes in powers of two


@dataclass
class Written:
    """What a rank has written."""

    files: FileFacts = field(default_factory=dict)
    places: Places = field(default_factory=dict)


@dataclass(frozen=True)
class ShareFile:
    """A file that a rank writes: what it holds, and its pieces, in host memory once ``ready`` was waited for."""

    name: str
    holds: str
    entries: tuple[Entry, ...]
    tensors: tuple[Tensor, ...]
    ready: torch.cuda.Event | None

    @property
    def described(self) -> list[Described]:
        """The boxes as they are stored."""
        return [Described(e.key, e.whole, e.start, e.extent, t.dtype) for e, t in zip(self.entries, self.tensors)]


def share_name(rank: int, number: int) -> str:
    """Return the name of a rank's file of its state of this number."""
    return f"__{rank}_{number}.distcp"


class Staging:
    """Host memory for what is being saved; taken with the first save and used again by all others."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []

    def files(self, states: dict[str, list[Entry]], rank: int, *, copy: bool) -> list[ShareFile]:
        """Return the files of a rank: of what it holds of each state, what it saves.

        ``copy``: the states may change before they are written. States on a device are copied in any case.
        """
        chosen = {holds: [entry for entry in entries if entry.writes] for holds, entries in states.items()}
        return self.files_of(chosen, rank, copy=copy)

    def files_of(self, chosen: dict[str, list[Entry]], rank: int, *, copy: bool) -> list[ShareFile]:
        """Return the files of a rank that hold these entries of each state, as :meth:`files` does."""
        tensors = {holds: [entry.tensor for entry in entries] for holds, entries in chosen.items()}
        on_device = any(tensor.is_cuda for each in tensors.values() for tensor in each)
        if copy or on_device:
            room = self._room([tensor for each in tensors.values() for tensor in each], pinned=on_device)
            tensors = {
                holds: [next(room).copy_(tensor, non_blocking=True) for tensor in each]
                for holds, each in tensors.items()
            }
        ready = None
        if on_device:  # what changes the states next comes after the copies on the same stream, without a wait here
            ready = torch.cuda.Event()
            ready.record()
        return [
            ShareFile(share_name(rank, number), holds, tuple(chosen[holds]), tuple(tensors[holds]), ready)
            for number, holds in enumerate(chosen)
            if chosen[holds]
        ]

    def _room(self, tensors: Sequence[Tensor], *, pinned: bool) -> Iterator[Tensor]:
        """Yield host memory, contiguous, for every tensor."""
        left = sum(_aligned(tensor.nbytes) for tensor in tensors)
        number, used = 0, 0
        for tensor in tensors:
            size = _aligned(tensor.nbytes)
            while number < len(self._blocks) and used + size > self._blocks[number].numel():
                number, used = number + 1, 0
            if number == len(self._blocks):
                taken = max(min(left, _BLOCK), size)
                self._blocks.append(torch.empty(taken, dtype=torch.uint8, pin_memory=pinned))
                used = 0
            yield self._blocks[number][used : used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            used += size
            left -= size


def _aligned(size: int) -> int:
    return -(-size // 64) * 64


class GivenUp(Exception):
    """A save that was told to stop."""


def write_share(files: Sequence[ShareFile], folder: Path, stop: threading.Event | None = None) -> Written:
    """Write this rank's files into ``folder``, which is made if need be.

    Raises: OSError: the disk refused. GivenUp: ``stop`` was set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = Written()
    if files and files[0].ready is not None:
        files[0].ready.synchronize()
    for file in files:
        target = PieceFile(folder / file.name)
        try:
            written.places[file.name] = places = []
            for tensor in file.tensors:
                if stop is not None and stop.is_set():
                    raise GivenUp("a newer one takes its place")
                places.append(target.add(tensor))
            written.files[file.name] = {**target.finish(), "holds": file.holds}
        except BaseException:
            target.abandon()
            raise
    return written


def write_description(index: bytes, folder: Path) -> FileFacts:
    """Write, on rank 0, what describes the whole; return the files' facts."""
    common = io.BytesIO()
    torch.save({}, common)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    return {
        INDEX: write_file(folder / INDEX, index),
        COMMON: write_file(folder / COMMON, common.getvalue()),
        "metadata.json": write_file(folder / "metadata.json", (folder / "metadata.json").read_bytes()),
    }
