"""Which checkpoint a run goes on from, and how its recipe has changed since. All ranks decide together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dsv3_megatron.checkpoint.changes import changes, read_recipe, refusal, show
from dsv3_megatron.checkpoint.load import Found, candidates_of, find_checkpoint
from dsv3_megatron.recipe import Recipe
from parallel.errors import CheckpointError


@dataclass(frozen=True)
class Start:
    """Where a run starts: from a checkpoint, or (None) from the first step."""

    found: Found | None
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # key of the recipe -> (then, now)

    @property
    def change(self) -> str:
        """The changes as a person reads them."""
        return "; ".join(f"{key}: {show(old)} -> {show(new)}" for key, (old, new) in self.changed.items())


def choose_start(recipe: Recipe, folder: Path, warn: Callable[[str], None]) -> Start:
    """Return the newest valid checkpoint in ``folder``, or the one the recipe names where there is none.

    ``warn``: told of each damaged one, on rank 0.
    Raises: CheckpointError: all are damaged, or of another model, or ``run.resume`` says otherwise.
    """
    first, mode = dist.get_rank() == 0, recipe.run.resume
    found, wrong = find_checkpoint(candidates_of(folder, recipe.checkpoint.load) if first else [])
    for message in wrong if first else ():
        warn(message)
    if found is None and wrong:
        damage = wrong[0].removeprefix("checkpoint: ").partition(";")[0]
        raise CheckpointError(
            f"{damage}, and no other checkpoint is valid; restore one, or remove the damaged ones ({len(wrong)}) to "
            "begin anew"
        )
    if mode == "required" and found is None:
        raise CheckpointError(f"run.resume = required, but {folder} holds no valid checkpoint; set run.resume=auto")
    if found is None:
        return Start(None)
    changed: list[Any] = [None]
    if first:
        changed = [changes(read_recipe(found.recipe), recipe.model_dump(mode="json"))]
    dist.broadcast_object_list(changed, src=0)
    if refused := refusal(changed[0]):
        raise CheckpointError(f"{found.path} was trained with {refused}; use that value, or name another run.name")
    if mode == "never":
        raise CheckpointError(
            f"run.resume = never, but {found.path} exists; name another run.name, or set run.resume=auto to go on "
            "from it"
        )
    return Start(found, changed[0])
