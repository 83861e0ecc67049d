"""A new run that begins with another run's weights: context extension, or any other next phase of training.

Weights, router biases, the optimizer's moments and the average of the weights come along; steps and tokens are counted
anew, and so is the order of samples. A run that has a checkpoint of its own goes on from that one instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsv3_megatron.checkpoint.changes import changes, read_recipe, refusal
from dsv3_megatron.checkpoint.manifest import checkpoints
from dsv3_megatron.recipe import Recipe
from dsv3_megatron.run.directory import RunDirectory
from parallel.errors import CheckpointError

MAY_DIFFER = ("model.rope_scaling", "model.max_position_embeddings")  # what context extension changes


def starting_candidates(start_from: str) -> list[Path]:
    """Return the checkpoints of the run directory ``start_from``, newest first."""
    return checkpoints(RunDirectory(start_from).checkpoints)


def check_start(recipe: Recipe) -> None:
    """Refuse what can be refused before data is read and a model is built. Raises CheckpointError."""
    start_from = recipe.run.start_from
    if not start_from or checkpoints(RunDirectory(recipe.run.directory).checkpoints):
        return
    found = starting_candidates(start_from)
    if not found:
        raise nothing_to_start_from(start_from, [])
    stored = found[0] / "recipe.yaml"
    if stored.is_file():  # else the checkpoint is damaged, which is told when its checksums are read
        refuse_other_model(start_from, other_model(stored, recipe.model_dump(mode="json")))


def refuse_other_model(start_from: str, difference: str | None) -> None:
    """Raise CheckpointError where ``other_model`` found a difference."""
    if difference:
        raise CheckpointError(
            f"run.start_from = {start_from} was trained with {difference}; use that value, or another run"
        )


def nothing_to_start_from(start_from: str, wrong: list[str]) -> CheckpointError:
    """Return the refusal of a run that has no checkpoint, or none that is whole."""
    folder = RunDirectory(start_from).checkpoints
    why = wrong[0].removeprefix("checkpoint: ") if wrong else f"{folder} holds no checkpoint"
    return CheckpointError(f"run.start_from = {start_from}: {why}; train that run first, or name another")


def other_model(recipe_path: Path, recipe: dict[str, Any]) -> str | None:
    """Return how the model that was trained differs from the recipe's where it must not, None if nowhere."""
    found = changes(read_recipe(recipe_path), recipe)
    return refusal({key: value for key, value in found.items() if not key.startswith(MAY_DIFFER)})
