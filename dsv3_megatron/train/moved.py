"""Tells how a changed recipe moves the curves of a run that goes on."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from pydantic import ValidationError

from dsv3_megatron.checkpoint.changes import read_recipe
from dsv3_megatron.data.mixture.order import Mixture
from dsv3_megatron.data.mixture.order import moved as moved_sources
from dsv3_megatron.data.mixture.phases import MixtureCurve, mixture_of_recipe
from dsv3_megatron.data.settings import DataSettings
from dsv3_megatron.optim.moved import moved_curves
from dsv3_megatron.optim.regime import Regime
from dsv3_megatron.optim.settings import OptimSettings
from dsv3_megatron.recipe import Recipe
from dsv3_megatron.train.journal import Journal
from dsv3_megatron.train.progress import Progress
from parallel.errors import RecipeError


def tell_moved_curves(stored_recipe: Path, recipe: Recipe, progress: Progress, journal: Journal) -> None:
    """Tell of every curve that is another for the next step than under the recipe of the checkpoint, on rank 0."""
    if not journal.speaks:
        return
    stored = read_recipe(stored_recipe)
    try:
        then = Regime(OptimSettings.model_validate(stored["optim"]), stored["data"]["sequence_length"])
        keys = {key: stored["data"].get(key) for key in ("weights", "mixture")}
        mixed = mixture_of_recipe(DataSettings.model_validate(keys))
    except (ValidationError, RecipeError, LookupError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        journal.note(f"warning: {stored_recipe} has no curves that can be compared with this recipe's ({why})")
        return
    for moved in moved_curves(then, Regime(recipe.optim, recipe.data.sequence_length), progress.tokens):
        journal.event("curve_moved", {"step": progress.step, **asdict(moved)}, f"warning: {moved}")
    _tell_moved_sources(mixed, recipe, progress, journal)


def _tell_moved_sources(then: MixtureCurve | None, recipe: Recipe, progress: Progress, journal: Journal) -> None:
    """Tell of the sources that do not go on where they stand."""
    now = mixture_of_recipe(recipe.data)
    if now == then:
        return
    key = "data.weights" if recipe.data.mixture is None else "data.mixture"
    if then is None or now is None:  # the shards decide, whose sizes are not known here
        lines = ["sources do not go on where they stand: samples are counted anew, as if it had always been so"]
    else:
        length = recipe.data.sequence_length
        lines = moved_sources(Mixture(then, length), Mixture(now, length), progress.samples)
    for line in lines:
        journal.event(
            "source_moved",
            {"step": progress.step, "reason": line},
            f"warning: {key} is another for the samples that are already read: {line}; change only what is to come",
        )
