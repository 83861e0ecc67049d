"""Parts of runs that begin with a checkpoint and leave one, for tests of checkpoints across backends and layouts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsv3_megatron.checkpoint.find import load_newest
from dsv3_megatron.checkpoint.load import load_checkpoint
from dsv3_megatron.checkpoint.save import Saver
from dsv3_megatron.pipeline.parts import Parts
from dsv3_megatron.train.build import build_parts
from dsv3_megatron.train.step import train_step
from launcher.command_line.compose import resolved_yaml
from parallel.errors import CheckpointError
from parallel.groups import start_processes, stop_processes
from parallel.world import World
from testing.training.on_te import forget_fp8_state
from testing.training.tiny import VALUES, named_weights, small_recipe, step_batches_of


@dataclass
class Life:
    """A part of a run: step ``first`` and those after it."""

    overrides: tuple[str, ...]
    first: int = 0
    steps: int = 2
    load: Path | None = None  # checkpoint to begin with
    weights_alone: bool = False  # load no optimizer, and return the weights
    save: Path | None = None  # folder to save into: what was loaded, as it is, or else at the end


def live(life: Life) -> dict[str, Any]:
    """Train on this rank; return losses and gradient norms of the steps, what loading told, and what it refused."""
    recipe, world = small_recipe(*life.overrides), World.from_environment()
    start_processes(world, torch.device("cpu"), timeout_seconds=120)
    try:
        parts = build_parts(recipe, recipe.layout(world.size), torch.device("cpu"))
        found: dict[str, Any] = {"notes": [], "losses": [], "norms": []}
        if life.load is not None:
            candidate, training = life.load, not life.weights_alone
            try:
                checkpoint, notes, wrong = load_newest(
                    lambda: [candidate], lambda found: load_checkpoint(found, parts, training=training)
                )
            except CheckpointError as refusal:
                return {"refused": str(refusal)}
            assert checkpoint is not None, wrong
            found["notes"] = notes
        if life.load is not None and life.save is not None:
            _save(parts, life.save, life.first)
        for number in range(life.first, life.first + life.steps):
            result = train_step(parts, step_batches_of(parts, number), VALUES)
            if parts.ema is not None:
                parts.ema.start()
                parts.ema.wait()  # the next step changes the weights that it reads
            found["losses"].append(result.lm_loss)
            found["norms"].append(result.grad_norm)
        if life.load is None and life.save is not None:
            _save(parts, life.save, life.first + life.steps)
        found["weights"] = _numbers(parts)
        return found
    finally:
        stop_processes()
        if recipe.backend == "te":
            forget_fp8_state()


def _save(parts: Parts, folder: Path, step: int) -> None:
    recipe = parts.recipe
    saver = Saver(folder, recipe.checkpoint, parts, resolved_yaml(recipe), lambda *told: None)
    saver.save_finally({"step": step, "tokens": 0, "samples": 0, "skipped": 0})


def _numbers(parts: Parts) -> dict[str, np.ndarray]:
    """Return this rank's weights by name, those held in FP8 as the numbers that they stand for."""
    return {name: weight.float().numpy() for name, weight in named_weights(parts).items()}
