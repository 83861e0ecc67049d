"""What watches a run: called between two steps on all ranks; what it returns is entered around the next step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

import dsv3_megatron.train.build as build_module
import dsv3_megatron.train.evaluation.scoring as scoring
from dsv3_megatron.checkpoint.find import Found, load_newest
from dsv3_megatron.checkpoint.hugging_face.export import export, shards_of
from dsv3_megatron.checkpoint.load import load_checkpoint
from dsv3_megatron.checkpoint.manifest import checkpoints
from dsv3_megatron.checkpoint.save import Saver
from dsv3_megatron.data.source.samples import evaluation_batches
from dsv3_megatron.data.tasks.requests import Request
from dsv3_megatron.megatron.replaced import replaced
from dsv3_megatron.pipeline.parts import Parts
from dsv3_megatron.report.page import write_report
from dsv3_megatron.train.build import build_parts
from dsv3_megatron.train.callbacks.evaluation import Evaluation
from dsv3_megatron.train.callbacks.saving import Saving
from dsv3_megatron.train.evaluation.scoring import evaluate_batches, score_requests
from dsv3_megatron.train.trainer import Callback, Trainer
from parallel.pipeline.live_memory import LiveMemory

C = TypeVar("C", bound=Callback)


def _callback(trainer: Trainer, kind: type[C]) -> C:
    (found,) = (callback for callback in trainer.callbacks if isinstance(callback, kind))
    return found


def saver_of(trainer: Trainer) -> Saver:
    """Return what saves the run."""
    return _callback(trainer, Saving).saver


def evaluate(trainer: Trainer) -> None:
    """Evaluate on held-out data."""
    _callback(trainer, Evaluation).evaluate(trainer)


def _score_requests(trainer: Trainer) -> None:
    """Score requests of several lengths, in rounds that are shorter than training's sequences and wider."""
    full, random = trainer.recipe.data.sequence_length, np.random.default_rng(trainer.progress.step)
    lengths = random.integers(2, full + 1, size=12)
    requests = [Request(random.integers(0, trainer.recipe.model.vocab_size, n + 1), int(n) // 2) for n in lengths]
    with replaced(scoring, "GRAIN", 4):
        assert score_requests(trainer.parts, requests) is not None


def _save(trainer: Trainer, *, beside: bool = False) -> None:
    saver = saver_of(trainer)
    saver.settings = saver.settings.model_copy(update={"asynchronous": beside})
    saver.save(asdict(trainer.progress))


def save_beside(trainer: Trainer) -> None:
    """Start an asynchronous save."""
    _save(trainer, beside=True)


def _newest(trainer: Trainer) -> Path:
    """Return the newest complete checkpoint; make one where there is none."""
    folder = trainer.journal.directory.checkpoints
    found = [checkpoints(folder)]
    dist.broadcast_object_list(found)
    if not found[0]:
        _save(trainer)
        found = [checkpoints(folder)]
        dist.broadcast_object_list(found)
    return found[0][0]


def _load_elsewhere(trainer: Trainer) -> None:
    """Fill another model of this process from a checkpoint, the average into its weights, and use it.

    megatron-core knows one set of process groups in a process: the other model shares the run's.
    """
    recipe = trainer.recipe.model_copy(update={"run": trainer.recipe.run.model_copy(update={"seed": 99})})
    share_groups = replaced(build_module, "build_groups", lambda *unused, **options: trainer.parts.groups)
    with share_groups, torch.random.fork_rng(devices=[]):
        other = build_parts(recipe, trainer.parts.layout, trainer.parts.device)
    _load_newest(trainer, other)
    if other.ema is not None:
        other.ema.copy_into_weights()
    batches = evaluation_batches(
        trainer.data.held_out, count=2, micro_batch=1, dp_rank=other.data_rank, dp=other.layout.dp
    )
    evaluate_batches(other, batches)


def _load_back(trainer: Trainer) -> None:
    """Save, and fill the run itself from what was saved."""
    _save(trainer)
    assert _load_newest(trainer, trainer.parts).progress["step"] == trainer.progress.step


def _load_newest(trainer: Trainer, parts: Parts) -> Found:
    """Fill the parts from the run's newest checkpoint; return it."""
    newest = _newest(trainer)
    found, _, wrong = load_newest(lambda: [newest], lambda found: load_checkpoint(found, parts, training=True))
    assert found is not None, wrong
    return found


def _export(trainer: Trainer) -> None:
    path = _newest(trainer)
    if trainer.journal.speaks:
        output = trainer.journal.directory.path / "exported"
        output.mkdir(exist_ok=True)
        export(shards_of(trainer.recipe.model, path, output, dtype="bf16", shard_bytes=2**30), output, processes=1)
    dist.barrier()


def _report(trainer: Trainer) -> None:
    if trainer.journal.speaks:
        write_report(trainer.journal.directory.path)


def _profile(trainer: Trainer) -> Any:
    return torch.profiler.profile(record_shapes=True)


def _measure_memory(trainer: Trainer) -> Any:
    return LiveMemory()


WATCHERS: dict[str, Callable[[Trainer], Any]] = {
    "evaluate": evaluate,
    "score requests": _score_requests,
    "save": _save,
    "save beside": save_beside,
    "load elsewhere": _load_elsewhere,
    "load back": _load_back,
    "export": _export,
    "report": _report,
    "profile": _profile,
    "measure memory": _measure_memory,
}
