"""A trained model of a run directory, whole, in this one process, whatever layout wrote it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from dsv3_megatron.checkpoint import te_amaxes
from dsv3_megatron.checkpoint.find import Found, choose_checkpoint
from dsv3_megatron.checkpoint.load import load_checkpoint
from dsv3_megatron.checkpoint.manifest import WEIGHTS, read_content
from dsv3_megatron.data.identity import other_text
from dsv3_megatron.data.source.build import Data
from dsv3_megatron.data.source.build import build as build_data
from dsv3_megatron.data.tokenizer import Tokenizer
from dsv3_megatron.data.tokenizer_identity import check_trained_with, described, tokenizer_of_run
from dsv3_megatron.megatron.host import choose_device
from dsv3_megatron.model.backend import backend_name
from dsv3_megatron.pipeline.parts import Parts
from dsv3_megatron.recipe import Recipe
from dsv3_megatron.train.build import build_parts
from dsv3_megatron.train.run import processes
from parallel.errors import CheckpointError, PackageError
from parallel.settings import ParallelSettings
from parallel.world import World

Weights = Literal["trained", "ema"]


@dataclass(frozen=True)
class TrainedModel:
    """What a run has learned."""

    parts: Parts
    tokenizer: Tokenizer | None
    checkpoint: Path
    progress: dict[str, Any]
    notes: tuple[str, ...] = ()  # what a person should know of how it was loaded
    held: Data | None = None  # None where only text was wanted, and the run keeps its own tokenizer

    @property
    def data(self) -> Data:
        """What the run reads."""
        assert self.held is not None, "it was loaded without data"
        return self.held


@contextmanager
def trained_model(
    recipe: Recipe,
    directory: str | Path,
    step: int | None = None,
    weights: Weights = "trained",
    *,
    with_data: bool = True,
    other_data: bool = False,
) -> Iterator[TrainedModel]:
    """Load the newest valid checkpoint of a run, or the one of ``step``, for as long as the block lasts.

    ``weights``: those trained, or their average over the last steps (optim.ema_decay).
    Text is read and written by the tokenizer that the run directory keeps, else by the data's; ``with_data=False`` asks
    for data only where the run keeps none. ``other_data``: the recipe's data was named in place of the run's own. A run
    that was trained on Transformer Engine runs on the torch backend where there is none, with a note.
    Raises: CheckpointError: there is none, it is damaged, it holds no average, data and run have different tokenizers,
    or the run's own data was exchanged. DataError: the run's tokenizer does not fit the model.
    """
    chosen = choose_checkpoint(directory, step, _read_for(weights))
    path = chosen.path
    content = read_content(path)
    found = Found.of(path, content)
    # What the checkpoint holds an average of is what was trained then.
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"freeze": found.freeze})})
    world = World(0, 1, 0)
    device = choose_device(recipe.run.device, world)
    alone, notes = as_it_runs_here(recipe.model_copy(update={"parallel": ParallelSettings()}), device)
    notes = [*chosen.warnings, *notes]
    own = tokenizer_of_run(directory, recipe.model.vocab_size)
    data, allowed = None, recipe.data.allow_other
    check_trained_with(path, content.get("tokenizer"), own, allowed=False)
    if with_data or own is None:
        data = build_data(recipe.data, vocab_size=recipe.model.vocab_size, seed=recipe.run.seed)
        trained_with = content.get("tokenizer") or described(own)
        if told := check_trained_with(path, trained_with, data.tokenizer, allowed=allowed):
            notes.append(told)
        difference = None if other_data or allowed else other_text(content.get("data"), data.identity)
        if difference:
            raise CheckpointError(
                f"{path} was trained on {difference}; restore those, or name the folder to evaluate on: data=FOLDER"
            )
    tokenizer = own if own is not None or data is None else data.tokenizer
    with processes(world, device), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        parts = build_parts(alone, alone.layout(1), device)
        extra = tuple(name for name in found.extra if name == te_amaxes.NAME and name in parts.extra_states)
        if weights == "ema" and (parts.ema is None or "ema" not in found.extra):
            raise CheckpointError(f"weights = ema, but {path} holds no average; train with optim.ema_decay=0.999")
        load_checkpoint(found, parts, training=False, extra=(*extra, "ema") if weights == "ema" else extra)
        if weights == "ema" and parts.ema is not None:
            parts.ema.copy_into_weights()
        yield TrainedModel(parts, tokenizer, path, found.progress, tuple(notes), data)


def _read_for(weights: Weights) -> tuple[str, ...]:
    """Return what is read of a checkpoint: what its files hold."""
    return (WEIGHTS, te_amaxes.NAME, *(("ema",) if weights == "ema" else ()))


def as_it_runs_here(recipe: Recipe, device: torch.device) -> tuple[Recipe, list[str]]:
    """Return a recipe that runs on this machine, and a line where that is another backend than the recipe's.

    A checkpoint is the same on both backends, and evaluating on a laptop what was trained on GPUs is common.
    """
    notes = []
    try:
        backend = backend_name(recipe.backend, device)
    except PackageError as error:
        backend = "torch"
        notes.append(f"on backend torch, not te, with which it was trained ({error.args[0].partition(';')[0]})")
    fp8 = recipe.precision.fp8
    if (
        backend == "torch" and fp8 is not None and fp8.hold_weights
    ):  # that is Transformer Engine's; the numbers are kept
        fp8 = fp8.model_copy(update={"hold_weights": False})
    precision = recipe.precision.model_copy(update={"fp8": fp8})
    return recipe.model_copy(update={"backend": backend, "precision": precision}), notes
