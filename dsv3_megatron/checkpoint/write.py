"""Planning and writing of a rank's share of a checkpoint: megatron-core plans, this file writes.

Planning is collective and touches no disk, so that no rank can fail alone inside it; writing is local and calls no
collective, so that it may run in a thread and may fail. megatron-core's own save mixes the two: where rank 0's disk is
full it raises, and the others wait for it for ever.
"""

from __future__ import annotations

import io
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import xxhash
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageWriterTransforms, _write_item
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

COMMON = "common.pt"  # megatron-core's name for what is no tensor
FileFacts = dict[str, dict[str, Any]]  # name -> {"bytes", "xxh3"}


@dataclass
class Written:
    """What a rank has written."""

    files: FileFacts = field(default_factory=dict)
    results: list[WriteResult] = field(default_factory=list)


@dataclass
class Plan:
    """What a rank will write, and on rank 0 what describes the whole."""

    file_name: str | None
    items: list[tuple[WriteItem, Tensor | io.BytesIO]]
    common: bytes
    writer: FileSystemWriterAsync
    metadata: Metadata | None  # on rank 0

    @property
    def tensor_bytes(self) -> int:
        """Bytes of tensors of this rank."""
        return sum(x.numel() * x.itemsize for _, x in self.items if isinstance(x, Tensor))


class _PlanOnly(TorchDistSaveShardedStrategy):
    """megatron-core's strategy up to the point where it would write (0.16.1)."""

    def _get_save_and_finalize_callbacks(self, writer: FileSystemWriterAsync, planned: tuple) -> tuple:
        return writer, planned[1]


def plan_write(state: dict[str, Any], *, copy: bool) -> Plan:
    """Return what this rank writes of a sharded state. Collective; no disk is touched.

    ``copy``: the state may change before it is written, so take a copy of every tensor, in RAM.
    """
    sharded, common = save_preprocess(state)
    # The planner makes sure of its folder: one that exists on every rank. Nothing is written there.
    strategy = _PlanOnly("torch_dist", 1, thread_count=1)
    writer, metadata = strategy.async_save(sharded, tempfile.gettempdir())
    file_name, items = None, []
    for _, name, (objects, tensors) in writer.write_buckets:
        file_name = name
        items += [*objects, *((item, _staged(tensor, copy)) for item, tensor in tensors)]
    if any(tensor.is_cuda for *_, (_, tensors) in writer.write_buckets for _, tensor in tensors):
        torch.cuda.synchronize()  # the copies to the host are done
    file = io.BytesIO()
    torch.save(common, file)
    return Plan(file_name, items, file.getvalue(), writer, metadata)


def _staged(tensor: Tensor, copy: bool) -> Tensor:
    if tensor.device.type != "cpu":
        return tensor.to("cpu", non_blocking=True)
    return tensor.clone() if copy else tensor


class ChecksummingFile:
    """A file that knows the checksum of what was written to it, in order; on the disk once closed without error."""

    def __init__(self, path: Path):
        self._file: BinaryIO = path.open("wb")
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


def write_share(plan: Plan, folder: Path) -> Written:
    """Write this rank's tensors into ``folder``, which is made if need be. Raises: OSError: the disk refused."""
    folder.mkdir(parents=True, exist_ok=True)
    written = Written()
    if plan.file_name is None:
        return written
    file, transforms = ChecksummingFile(folder / plan.file_name), _StorageWriterTransforms()
    stream = cast(io.IOBase, file)  # as much of one as torch asks for
    try:
        for item, data in plan.items:
            written.results.append(
                _write_item(transforms, stream, data, item, plan.file_name, SerializationFormat.TORCH_SAVE)
            )
        written.files[plan.file_name] = file.finish()
    except BaseException:
        file.abandon()
        if file.error is not None:
            raise file.error from None
        raise
    return written


def write_description(plan: Plan, folder: Path, shares: list[Written]) -> FileFacts:
    """Write, on rank 0, what describes the whole: common state, megatron-core's and torch's metadata."""
    files = {name: facts for share in shares for name, facts in share.files.items()}
    files[COMMON] = write_file(folder / COMMON, plan.common)
    plan.writer.path = plan.writer.checkpoint_dir = folder
    plan.writer.finish(plan.metadata, [share.results for share in shares])
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    for name in (".metadata", "metadata.json"):
        files[name] = write_file(folder / name, (folder / name).read_bytes())
    return files
