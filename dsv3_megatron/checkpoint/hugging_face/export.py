"""A checkpoint -> Hugging Face safetensors: shard by shard, in parallel, verified after writing, resumable.

A worker holds one shard in memory, never the model. The index is written last: a folder without one is incomplete, and
the same command goes on with the shards that are missing.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import multiprocessing
import os
import stat
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsv3_megatron.checkpoint.find import Found
from dsv3_megatron.checkpoint.hugging_face.done import facts_if_done, forget_marks, mark_done
from dsv3_megatron.checkpoint.hugging_face.headers import INDEX, TRAINED_WITH
from dsv3_megatron.checkpoint.hugging_face.names import Published, our_shapes, published_tensors
from dsv3_megatron.checkpoint.hugging_face.published_scales import kept_scales
from dsv3_megatron.checkpoint.hugging_face.regions import Regions
from dsv3_megatron.checkpoint.manifest import checksum, read_content
from dsv3_megatron.model.freeze import is_frozen
from dsv3_megatron.model.settings import ModelSettings
from dsv3_megatron.precision.weights import quantise_weight, requantise_weight
from dsv3_megatron.run.files import write_json
from dsv3_megatron.run.made import new_file
from parallel.errors import CheckpointError

EMA = "ema."  # begins the keys of the average of the weights (train/ema.py)
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


@dataclass(frozen=True)
class Scales:
    """How the scales of an export in FP8 are chosen."""

    power_of_two: bool = False
    kept: Path | None = None  # those that the weights came with, for blocks that are still as published


@dataclass(frozen=True)
class Shard:
    """One file to write."""

    checkpoint: Path
    folder: Path
    name: str
    dtype: str
    tensors: tuple[Published, ...]
    prefix: str = ""  # of the keys in the checkpoint: "" for the weights trained, "ema." for their average
    scales: Scales = Scales()
    freeze: tuple[str, ...] = ()  # what was not trained, and is its own average

    def key_of(self, tensor: Published) -> str:
        """Return the key in the checkpoint that holds a tensor."""
        return _key(tensor.key, self.prefix, self.freeze)

    @property
    def path(self) -> Path:
        """Where it is written."""
        return self.folder / self.name


def _key(name: str, prefix: str, freeze: tuple[str, ...]) -> str:
    """Return the key of a tensor of ours in a checkpoint: an average of what was frozen is not kept."""
    return name if is_frozen(freeze, name) else prefix + name


def plan_shards(model: ModelSettings, checkpoint: Path, folder: Path, *, dtype: str, shard_bytes: int) -> list[Shard]:
    """Return the files to write, each of at most ``shard_bytes`` (one tensor at least), in the published order."""
    groups: list[list[Published]] = [[]]
    size = 0
    for tensor in published_tensors(model):
        needed = file_bytes(tensor, dtype)
        if groups[-1] and size + needed > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += needed
    count = len(groups)
    names = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
    return [Shard(checkpoint, folder, name, dtype, tuple(group)) for name, group in zip(names, groups)]


def file_bytes(tensor: Published, dtype: str) -> int:
    """Return the bytes a tensor takes in a file, its block scales included."""
    count = 1
    for size in tensor.shape:
        count *= size
    if tensor.is_float32:
        return 4 * count
    if dtype == "fp8" and tensor.is_quantised:
        return count + 4 * (-(-tensor.shape[0] // 128)) * (-(-tensor.shape[1] // 128))
    return count * TORCH_DTYPES[dtype].itemsize


def as_stored(tensor: Published, values: Tensor, dtype: str, scales: Scales = Scales()) -> dict[str, Tensor]:
    """Return the entries of a file for a tensor's values: one, or data and block scales."""
    values = values.reshape(tensor.shape)
    if tensor.is_float32:
        return {tensor.name: values.float()}
    if dtype == "fp8" and tensor.is_quantised:
        rows, columns = tensor.shape
        grid = -(-rows // 128), -(-columns // 128)
        kept = kept_scales(scales.kept, tensor.name, grid) if scales.kept else None
        if kept is None:
            data, scale_inv = quantise_weight(values.float(), power_of_two=scales.power_of_two)
        else:
            powers = scales.power_of_two or kept.dtype == torch.float8_e8m0fnu  # which holds nothing else
            data, scale_inv = requantise_weight(values, kept.float(), power_of_two=powers)
            scale_inv = scale_inv.to(kept.dtype)
        return {tensor.name: data, f"{tensor.name}_scale_inv": scale_inv}
    return {tensor.name: values.to(TORCH_DTYPES[dtype])}


def write_shard(shard: Shard) -> dict[str, Any]:
    """Write one file, read it back, and return its record: names, bytes, checksum.

    A file that an earlier call has finished is checked and kept. Raises: CheckpointError: what was read back differs.
    """
    torch.set_num_threads(1)
    path, source = shard.path, _source(shard)
    if (kept := facts_if_done(path, source)) is not None:
        return kept
    regions = _regions(shard.checkpoint)
    entries: dict[str, Tensor] = {}
    for tensor in shard.tensors:
        values = regions.read(shard.key_of(tensor), tensor.start, tensor.extent)
        entries |= as_stored(tensor, values, shard.dtype, shard.scales)
    partial = path.with_name(f".{path.name}.partial")
    try:
        new_file(partial).close()
        mode = stat.S_IMODE(partial.stat().st_mode)
        save_file(entries, partial, metadata={"format": "pt"})
        partial.chmod(mode)  # safetensors makes a file of its own, for the owner alone whatever the umask says
        _sync(partial)
    except Exception as error:  # safetensors has an error of its own for what the system says
        partial.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} could not be written ({reason}); free space and run the command again") from None
    with safe_open(partial, "pt") as file:
        for name, expected in entries.items():
            if not torch.equal(file.get_tensor(name).view(torch.uint8), expected.contiguous().view(torch.uint8)):
                raise CheckpointError(f"{partial}: {name} read back differs from what was written; check the disk")
    os.replace(partial, path)
    size = sum(x.numel() * x.itemsize for x in entries.values())
    return mark_done(path, source, {"names": sorted(entries), "bytes": size, "xxh3": checksum(path)})


@functools.lru_cache(maxsize=1)
def _regions(checkpoint: Path) -> Regions:
    """Return the tensors of a checkpoint: where they lie is read once a worker."""
    return Regions(checkpoint)


def _source(shard: Shard) -> str:
    """Return what a shard was made of: another checkpoint or dtype makes it anew."""
    files = sorted((name, facts["xxh3"]) for name, facts in read_content(shard.checkpoint)["files"].items())
    content = xxhash.xxh3_128_hexdigest(json.dumps(files).encode())
    kept = shard.scales.kept.stat().st_mtime_ns if shard.scales.kept else None
    return f"{content} {shard.prefix}{shard.dtype} {len(shard.tensors)} {shard.scales.power_of_two} {kept}"


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def shards_of(
    model: ModelSettings,
    checkpoint: Path,
    folder: Path,
    *,
    dtype: str,
    shard_bytes: int,
    prefix: str = "",
    scales: Scales = Scales(),
) -> list[Shard]:
    """Return the files to write of a checkpoint whose manifest was checked; nothing is touched yet.

    Args:
        dtype: fp32, bf16 or fp8 (128x128 blocks).
        prefix: "" for the weights trained, EMA for their average.
        scales: of fp8.
    Raises: CheckpointError: its tensors are not those of the model.
    """
    freeze = Found.of(checkpoint, read_content(checkpoint)).freeze
    _check_shapes(model, checkpoint, prefix, freeze)
    plain = plan_shards(model, checkpoint, folder, dtype=dtype, shard_bytes=shard_bytes)
    return [replace(shard, prefix=prefix, scales=scales, freeze=freeze) for shard in plain]


def _check_shapes(model: ModelSettings, checkpoint: Path, prefix: str, freeze: tuple[str, ...]) -> None:
    stored = Regions(checkpoint).shapes
    if prefix == EMA and not any(key.startswith(EMA) for key in stored):
        raise CheckpointError(f"weights = ema, but {checkpoint} holds no average; train with optim.ema_decay=0.999")
    for name, shape in our_shapes(model).items():
        key = _key(name, prefix, freeze)
        if stored.get(key) != shape:
            raise CheckpointError(
                f"{checkpoint}: {key} has shape {stored.get(key)}, the recipe's model needs {shape}; "
                "use the recipe it was trained with"
            )


def export(
    shards: list[Shard],
    folder: Path,
    *,
    processes: int,
    progress: Callable[[int, int, int], None] = lambda done, count, size: None,
    trained_with: dict[str, Any] | None = None,
    earlier: Collection[str] = (),
) -> int:
    """Write the files of a model (:func:`shards_of`) and their index; return the bytes of tensors.

    Args:
        trained_with: the tokenizer and the text, as the checkpoint's manifest describes them: kept in the index.
        processes: workers; each holds one shard in memory.
        progress: told (shards done, shards, bytes done) after each shard.
        earlier: files of an earlier export that this one replaces; shards that it does not write again are removed.
    """
    (folder / INDEX).unlink(missing_ok=True)
    weight_map: dict[str, str] = {}
    size = 0
    for number, (shard, record) in enumerate(run_all(write_shard, shards, processes)):
        weight_map |= dict.fromkeys(record["names"], shard.name)
        size += record["bytes"]
        progress(number + 1, len(shards), size)
    kept = {shard.name for shard in shards}
    for other in earlier:
        if fnmatch.fnmatchcase(other, "model-*.safetensors") and other not in kept:  # of other shard sizes
            (folder / other).unlink(missing_ok=True)
    known = {name: facts for name, facts in (trained_with or {}).items() if facts is not None}
    metadata = {"total_size": size, **({TRAINED_WITH: known} if known else {})}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)
    forget_marks(folder)
    return size


def run_all(work: Callable[[Any], Any], jobs: list[Any], processes: int) -> Iterator[tuple[Any, Any]]:
    """Yield (job, result) as jobs finish, on so many processes; in this one if one is enough."""
    if processes <= 1 or len(jobs) <= 1:
        for job in jobs:
            yield job, work(job)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    with ProcessPoolExecutor(min(processes, len(jobs)), context) as pool:
        running = {pool.submit(work, job): job for job in jobs}
        try:
            for done in as_completed(running):
                yield running[done], done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
