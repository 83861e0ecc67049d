"""Hugging Face safetensors -> a checkpoint of ours: file by file, in parallel, verified by checksums, resumable.

Each input file becomes one file of the checkpoint, tensor by tensor, so that memory is one tensor a worker and never
the model. No model is built: the boxes of ``hugging_face.published_tensors`` are the chunks of the checkpoint, which
any layout then loads. It holds weights and router biases; a run that goes on from it begins with fresh moments.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsv3_megatron.checkpoint.hugging_face.done import facts_if_done, forget_marks, mark_done
from dsv3_megatron.checkpoint.hugging_face.export import INDEX, run_all
from dsv3_megatron.checkpoint.hugging_face.names import Published, our_shapes, published_tensors
from dsv3_megatron.checkpoint.index import Described, Places, describe_pieces
from dsv3_megatron.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    RECIPE,
    WEIGHTS,
    FileFacts,
    folder_name,
    manifest_text,
    sync_folder,
)
from dsv3_megatron.checkpoint.piece_files import PieceFile, write_file
from dsv3_megatron.checkpoint.write import write_description
from dsv3_megatron.model.settings import ModelSettings
from dsv3_megatron.precision.weights import dequantise_weight
from parallel.errors import CheckpointError

SCALE = "_scale_inv"


@dataclass(frozen=True)
class _Job:
    """One input file."""

    source: Path
    target: Path
    tensors: tuple[Published, ...]
    files: dict[str, str]  # every tensor of the input -> its file
    dtype: str | None  # fp32 or bf16; None = as in the file


def read_index(folder: Path) -> dict[str, str]:
    """Return the file of every tensor of a Hugging Face folder. Raises: CheckpointError: there are no weights."""
    if (folder / INDEX).is_file():
        try:
            return json.loads((folder / INDEX).read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / INDEX} cannot be read ({error}); fetch it again") from None
    single = folder / "model.safetensors"
    if not single.is_file():
        raise CheckpointError(f"{folder} holds neither {INDEX} nor model.safetensors; is the export finished?")
    try:
        with safe_open(single, "pt") as file:
            return dict.fromkeys(file.keys(), single.name)
    except SafetensorError as error:
        raise CheckpointError(f"{single} cannot be read ({error}); fetch it again") from None


def depths_present(model: ModelSettings, files: dict[str, str]) -> int:
    """Return the MTP depths whose weights are there: transformers saves none."""
    first = model.num_hidden_layers
    present = [f"model.layers.{first + d}.eh_proj.weight" in files for d in range(model.num_nextn_predict_layers)]
    return sum(present)


def check_names(model: ModelSettings, files: dict[str, str], folder: Path) -> None:
    """Raise CheckpointError where tensors are missing, or there that the model does not have."""
    wanted = {tensor.name for tensor in published_tensors(model)}
    given = {name.removesuffix(SCALE) for name in files}
    if missing := sorted(wanted - given):
        raise CheckpointError(
            f"{folder} lacks {missing[0]}{_and_more(missing)}, which its config.json asks for; fetch it again"
        )
    ignored = ("rotary_emb.inv_freq",)  # computed, not learned; older files hold it
    if extra := sorted(name for name in given - wanted if not name.endswith(ignored)):
        raise CheckpointError(
            f"{folder} holds {extra[0]}{_and_more(extra)}, which a model of its config.json does not have; "
            "check the configuration"
        )
    if absent := sorted({file for file in files.values() if not (folder / file).is_file()}):
        raise CheckpointError(f"{folder / absent[0]} is missing{_and_more(absent)}; fetch it again")


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def import_weights(
    model: ModelSettings,
    source: Path,
    checkpoints: Path,
    *,
    recipe: str,
    dtype: str | None,
    processes: int,
    progress: Callable[[int, int, int], None] = lambda done, count, size: None,
    tokenizer: dict[str, str] | None = None,
) -> Path:
    """Write ``checkpoints/step_00000000`` from the safetensors in ``source``; return it.

    Args:
        recipe: the resolved recipe to store with it.
        dtype: fp32 or bf16; None takes each tensor as it is, FP8 as BF16.
        processes: workers; each holds one tensor in memory.
        progress: told (files done, files, bytes done) after each file.
        tokenizer: of the model, as a manifest describes it; None where it came without one.
    Raises: CheckpointError: names or shapes do not fit, or a file is damaged.
    """
    files = read_index(source)
    check_names(model, files, source)
    partial = checkpoints / f".{folder_name(0)}.import"
    partial.mkdir(parents=True, exist_ok=True)
    jobs = _jobs(model, source, partial, files, dtype)
    records, size = [], 0
    for number, (_, record) in enumerate(run_all(_import_file, jobs, processes)):
        records.append(record)
        size += record["bytes"]
        progress(number + 1, len(jobs), size)
    return _finish(model, partial, checkpoints / folder_name(0), records, recipe, tokenizer)


def _jobs(model: ModelSettings, source: Path, partial: Path, files: dict[str, str], dtype: str | None) -> list[_Job]:
    by_file: dict[str, list[Published]] = {}
    for tensor in published_tensors(model):
        by_file.setdefault(files[tensor.name], []).append(tensor)
    return [
        _Job(source / name, partial / f"__{number}_0.distcp", tuple(by_file[name]), files, dtype)
        for number, name in enumerate(sorted(by_file))
    ]


def _import_file(job: _Job) -> dict[str, Any]:
    """Write one file of the checkpoint, and return its record; one that is finished already is kept."""
    torch.set_num_threads(1)
    stat = job.source.stat()
    source = [job.source.name, stat.st_size, stat.st_mtime_ns, job.dtype, FORMAT]
    if (kept := facts_if_done(job.target, source)) is not None:
        return kept
    entries = []
    target = PieceFile(job.target)
    try:
        with safe_open(job.source, "pt") as file:
            for tensor in job.tensors:
                values = _values(job, file, tensor)
                if tensor.copy_of:
                    _check_copy(job, tensor, tensor.copy_of, values)
                    continue
                offset, length = target.add(values.reshape(tensor.extent))
                place = {"key": tensor.key, "start": tensor.start, "extent": tensor.extent}
                name = str(values.dtype).removeprefix("torch.")
                entries.append({**place, "dtype": name, "offset": offset, "length": length})
        facts = target.finish()
    except SafetensorError as error:
        target.abandon()
        raise CheckpointError(f"{job.source} cannot be read ({error}); fetch it again") from None
    except OSError as error:
        target.abandon()
        raise CheckpointError(
            f"{job.target} could not be written ({error.strerror}); free space and run the command again"
        ) from None
    return mark_done(job.target, source, {"name": job.target.name, **facts, "entries": entries})


def _values(job: _Job, file: Any, tensor: Published) -> Tensor:
    """Return a tensor's values in the dtype to keep them in."""
    found = file.get_tensor(tensor.name)
    if tuple(found.shape) != tensor.shape:
        raise CheckpointError(
            f"{job.source}: {tensor.name} has shape {tuple(found.shape)}, its config.json says {tensor.shape}"
        )
    if tensor.is_float32:
        return found.float()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, None: None}[job.dtype]
    if found.dtype != torch.float8_e4m3fn:
        return found if dtype is None else found.to(dtype)
    name = tensor.name + SCALE
    if name not in job.files:
        raise CheckpointError(f"{job.source}: {tensor.name} is FP8, but {name} is nowhere; fetch the files again")
    if job.files[name] == job.source.name:
        scales = file.get_tensor(name)
    else:
        with safe_open(job.source.with_name(job.files[name]), "pt") as other:
            scales = other.get_tensor(name)
    return dequantise_weight(found, scales, dtype or torch.bfloat16)


def _check_copy(job: _Job, tensor: Published, copy_of: str, values: Tensor) -> None:
    """Refuse an MTP module with an embedding or head of its own: here, as published, they are the model's."""
    with safe_open(job.source.with_name(job.files[copy_of]), "pt") as other:
        original = other.get_tensor(copy_of)
    if not torch.equal(values, original.to(values.dtype)):
        raise CheckpointError(
            f"{job.source}: {tensor.name} differs from {copy_of}; an MTP module that does not share them with "
            "the model cannot be built here"
        )


def _finish(
    model: ModelSettings,
    partial: Path,
    target: Path,
    records: list[dict[str, Any]],
    recipe: str,
    tokenizer: dict[str, str] | None,
) -> Path:
    """Describe what the workers have written as one checkpoint, and put it in its place."""
    boxes: dict[str, list[Described]] = {}
    places: Places = {}
    files: FileFacts = {}
    shapes = our_shapes(model)
    for record in records:
        name, entries = record["name"], record["entries"]
        files[name] = {"bytes": record["bytes"], "xxh3": record["xxh3"], "holds": WEIGHTS}
        places[name] = [(entry["offset"], entry["length"]) for entry in entries]
        boxes[name] = [
            Described(e["key"], shapes[e["key"]], tuple(e["start"]), tuple(e["extent"]), getattr(torch, e["dtype"]))
            for e in entries
        ]
    files |= write_description(pickle.dumps(describe_pieces(boxes, places)), partial)
    files[RECIPE] = write_file(partial / RECIPE, recipe.encode())
    progress = {"step": 0, "tokens": 0, "samples": 0, "skipped": 0}
    facts: dict[str, Any] = {"layout": None, "extra": [], "optimizer": False, "tokenizer": tokenizer}
    write_file(partial / MANIFEST, manifest_text(progress, files, facts).encode())
    forget_marks(partial)
    sync_folder(partial)
    if target.exists():
        shutil.rmtree(target)
    os.replace(partial, target)
    sync_folder(target.parent)
    return target
