"""Where a run starts: from its newest valid checkpoint, from another run's weights, or from the first step.

A new run may begin with another run's weights (``run.start_from``): context extension, or any other next phase of
training. Weights, router biases, the optimizer's moments and the average of the weights come along; steps and tokens
are counted anew, and so is the order of samples. A run that has a checkpoint of its own resumes from that one instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dsv3_megatron.checkpoint.changes import changes, read_recipe, refusal
from dsv3_megatron.checkpoint.find import Found, load_chosen, load_newest
from dsv3_megatron.checkpoint.load import load_checkpoint
from dsv3_megatron.checkpoint.manifest import checkpoints
from dsv3_megatron.checkpoint.memory.folder import State
from dsv3_megatron.checkpoint.memory.saver import MemorySaver
from dsv3_megatron.data.identity import check_counted_in
from dsv3_megatron.data.source.build import Data
from dsv3_megatron.data.tokenizer import Tokenizer
from dsv3_megatron.data.tokenizer_identity import check_trained_with
from dsv3_megatron.optim.regime import Regime
from dsv3_megatron.pipeline.parts import Parts
from dsv3_megatron.recipe import Recipe
from dsv3_megatron.run.directory import RunDirectory
from dsv3_megatron.train.expert_load import routers
from dsv3_megatron.train.journal import Journal
from dsv3_megatron.train.moved import tell_moved_curves
from dsv3_megatron.train.progress import Progress
from parallel.agree import agreed
from parallel.errors import CheckpointError

# What context extension changes, and what is read only where weights are drawn.
MAY_DIFFER = ("model.rope_scaling", "model.max_position_embeddings", "model.initializer_range")


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        saved_step: the step that the run's own newest checkpoint holds; None where it was loaded from elsewhere.
        in_memory: the state in memory that it was loaded from, if it was.
    """

    progress: Progress
    saved_step: int | None = None
    in_memory: State | None = None


def load_start(
    parts: Parts, directory: RunDirectory, journal: Journal, data: Data, memory: MemorySaver | None = None
) -> Start:
    """Fill this rank from the newest valid checkpoint, on disk or in memory, if there is one. All ranks together.

    ``data``: that it will be trained on.
    Raises: CheckpointError: all are damaged, or of another model, other data or another tokenizer, or ``run.resume``
    says otherwise.
    """
    recipe = parts.recipe

    def check_and_load(found: Found) -> list[str]:
        told = _check_tokenizer(found.path, found, parts, data.tokenizer)
        samples = Progress.of(found.progress).samples
        told += check_counted_in(
            str(found.path), found.data, data.identity, samples=samples, allowed=recipe.data.allow_other
        )
        return [*told, *load_checkpoint(found, parts, training=True)]

    def warn(message: str) -> None:
        journal.event("damaged", {"reason": message}, f"warning: {message}")

    states, remarks = memory.states(warn) if memory else ([], [])
    for remark in remarks:
        journal.event("memory_not_used", {"reason": remark}, f"warning: {remark}")
    start, notes = load_chosen(recipe, directory.checkpoints, warn, check_and_load, states)
    if (found := start.found) is None:
        if recipe.run.start_from:
            _load_other_run(recipe.run.start_from, parts, journal, data.tokenizer)
        return Start(Progress())
    progress = Progress.of(found.progress)
    state = next((each.state for each in states if found.path.parent.name == each.state.name), None)
    where = f"{'memory, ' if state else ''}{found.path} (step {progress.step}, {progress.tokens:,} tokens)"
    values = {"step": progress.step, "path": str(found.path), "memory": state is not None}
    journal.event("resumed", values, f"resumed from {where}")
    for note in notes or ():
        journal.note(note)
    if start.changed:
        journal.event("recipe_changed", {"changes": start.changed}, f"recipe changed since then: {start.change}")
        tell_moved_curves(found.recipe, recipe, progress, journal)
    own = found.path.parent == directory.checkpoints
    return Start(progress, progress.step if own else None, state)


def _check_tokenizer(place: str | Path, found: Found, parts: Parts, tokenizer: Tokenizer | None) -> list[str]:
    """Return a line where the data's tokenizer is another one, and may be. Raises CheckpointError: it may not."""
    allowed = parts.recipe.data.allow_other
    line = check_trained_with(place, found.tokenizer, tokenizer, allowed=allowed)
    return [line] if line else []


def _load_other_run(start_from: str, parts: Parts, journal: Journal, tokenizer: Tokenizer | None) -> None:
    """Begin with the weights of another run, counting anew."""
    optimizers: set[str] = {parts.recipe.optim.name}  # of this run and, on the rank that speaks, of the other

    def check_and_load(found: Found) -> list[str]:
        with agreed(looked=journal.speaks):
            if journal.speaks:
                refuse_other_model(start_from, other_model(found.recipe, parts.recipe.model_dump(mode="json")))
                optimizers.add(read_recipe(found.recipe)["optim"].get("name", "adamw"))
        told = _check_tokenizer(f"run.start_from = {start_from}", found, parts, tokenizer)
        return [*told, *load_checkpoint(found, parts, training=True)]

    found, notes, wrong = load_newest(lambda: starting_candidates(start_from), check_and_load)
    if found is None:
        raise nothing_to_start_from(start_from, wrong)
    bias, rate = _largest_bias(parts), Regime(parts.recipe.optim, parts.recipe.data.sequence_length).learning_rate(0)
    facts = {"path": str(found.path), "moments": found.optimizer, "largest_bias": bias, "learning_rate": rate}
    kept = [] if bias is None else [f"router biases as they are there (largest {bias:.2g})"]
    same = "moments too" if len(optimizers) == 1 else "moments of what the same optimizer updates"
    kept.append(same if found.optimizer else "moments fresh")
    kept.append(f"learning rate from the start of its curve ({rate:.2g})")
    line = f"started from {found.path}, steps and tokens counted anew: {', '.join(kept)}"
    journal.event("started_from", facts, line)
    for note in notes or ():
        journal.note(note)


def _largest_bias(parts: Parts) -> float | None:
    """Return the largest router bias of all ranks by its size; None where no router has one. Collective."""
    sizes = [router.expert_bias.abs().max() for router in routers(parts).values() if router.expert_bias is not None]
    largest = torch.stack(sizes).max() if sizes else torch.tensor(-1.0)  # a stage of dense layers has none
    largest = largest.float().to(parts.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return None if largest < 0 else largest.item()


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
