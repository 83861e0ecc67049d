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
import xxhash

from dsv3_megatron.checkpoint.hugging_face.done import facts_if_done, forget_marks, mark_done
from dsv3_megatron.checkpoint.hugging_face.export import run_all
from dsv3_megatron.checkpoint.hugging_face.names import our_shapes
from dsv3_megatron.checkpoint.hugging_face.sources import Source, Sources
from dsv3_megatron.checkpoint.hugging_face.values import OpenFiles, check_copy
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
from parallel.errors import CheckpointError


@dataclass(frozen=True)
class _Job:
    """One input file."""

    folder: Path
    file: str
    target: Path
    sources: tuple[Source, ...]
    dtype: str | None  # fp32 or bf16; None = as in the file


def import_weights(
    sources: Sources,
    checkpoints: Path,
    *,
    recipe: str,
    dtype: str | None,
    processes: int,
    progress: Callable[[int, int, int], None] = lambda done, count, size: None,
    tokenizer: dict[str, str] | None = None,
    trained_on: dict[str, Any] | None = None,
) -> Path:
    """Write ``checkpoints/step_00000000`` from safetensors; return it.

    Args:
        recipe: the resolved recipe to store with it.
        dtype: fp32 or bf16; None takes each tensor as it is, FP8 as BF16.
        processes: workers; each holds one tensor in memory.
        progress: told (files done, files, bytes done) after each file.
        tokenizer: of the model, as a manifest describes it; None where it came without one.
        trained_on: the text, where the export says which. A run that goes on from here counts its samples in its own.
    Raises: CheckpointError: a file is damaged or holds what is no finite number.
    """
    partial = checkpoints / f".{folder_name(0)}.import"
    partial.mkdir(parents=True, exist_ok=True)
    jobs = _jobs(sources, partial, dtype)
    for other in set(partial.glob("*.distcp")) - {job.target for job in jobs}:
        other.unlink()  # of an import that was stopped, with more files
    records, size = [], 0
    for number, (_, record) in enumerate(run_all(_import_file, jobs, processes)):
        records.append(record)
        size += record["bytes"]
        progress(number + 1, len(jobs), size)
    text = {"tokenizer": tokenizer, "trained_on": trained_on}
    return _finish(sources.model, partial, checkpoints / folder_name(0), records, recipe, text)


def _jobs(sources: Sources, partial: Path, dtype: str | None) -> list[_Job]:
    by_file: dict[str, list[Source]] = {}
    for source in sources.found:
        by_file.setdefault(source.stored.tensor.file, []).append(source)
    return [
        _Job(sources.folder, file, partial / f"__{number}_0.distcp", tuple(by_file[file]), dtype)
        for number, file in enumerate(sorted(by_file))
    ]


def _import_file(job: _Job) -> dict[str, Any]:
    """Write one file of the checkpoint, and return its record; one that is finished already is kept."""
    torch.set_num_threads(1)
    if (kept := facts_if_done(job.target, source := _made_of(job))) is not None:
        return kept
    entries = []
    target = PieceFile(job.target)
    try:
        with OpenFiles(job.folder) as files:
            for one in job.sources:
                box = one.target
                values = files.values(one.stored, "fp32" if box.is_float32 else job.dtype)
                if one.copy_of:
                    check_copy(files, one, values, job.dtype)
                    continue
                offset, length = target.add(values.reshape(box.extent))
                place = {"key": box.key, "start": box.start, "extent": box.extent}
                name = str(values.dtype).removeprefix("torch.")
                entries.append({**place, "dtype": name, "offset": offset, "length": length})
        facts = target.finish()
    except CheckpointError:
        target.abandon()
        raise
    except OSError as error:
        target.abandon()
        raise CheckpointError(
            f"{job.target} could not be written ({error.strerror}); free space and run the command again"
        ) from None
    return mark_done(job.target, source, {"name": job.target.name, **facts, "entries": entries})


def _made_of(job: _Job) -> list[Any]:
    """Return what a file of the checkpoint is made of: another input, dtype or reading of it makes it anew."""
    stored = [source.stored for source in job.sources]
    files = sorted({job.file, *(one.scale.file for one in stored if one.scale)})
    stats = [(job.folder / file).stat() for file in files]
    reading = xxhash.xxh3_128_hexdigest(json.dumps([str(source) for source in job.sources]).encode())
    return [[[name, s.st_size, s.st_mtime_ns] for name, s in zip(files, stats)], job.dtype, reading, FORMAT]


def _finish(
    model: ModelSettings,
    partial: Path,
    target: Path,
    records: list[dict[str, Any]],
    recipe: str,
    text: dict[str, dict[str, Any] | None],
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
    facts: dict[str, Any] = {"layout": None, "extra": [], "optimizer": False, **text}
    write_file(partial / MANIFEST, manifest_text(progress, files, facts).encode())
    forget_marks(partial)
    sync_folder(partial)
    if target.exists():
        shutil.rmtree(target)
    os.replace(partial, target)
    sync_folder(target.parent)
    return target
