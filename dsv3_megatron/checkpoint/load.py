"""Finding a checkpoint that is as it was written, and filling a rank from it, in any layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.api import CheckpointException

from dsv3_megatron.build import Parts
from dsv3_megatron.checkpoint.manifest import checkpoints, problems, read_content
from dsv3_megatron.checkpoint.save import RANDOM, RECIPE
from dsv3_megatron.checkpoint.state import restore_random_state, whole_state
from parallel.errors import CheckpointError


@dataclass(frozen=True)
class Found:
    """A checkpoint whose every byte was checked."""

    path: Path
    progress: dict[str, Any]
    extra: tuple[str, ...] = ()
    optimizer: bool = True  # whether it holds the state of a run, or (imported) weights alone

    @property
    def recipe(self) -> Path:
        """The resolved recipe it was trained with."""
        return self.path / RECIPE


def find_checkpoint(candidates: list[Path]) -> tuple[Found | None, list[str]]:
    """Return the first candidate whose files are all as written, and what was wrong with those before it.

    All ranks call this together; rank 0's candidates count, and each rank reads its share of the files.
    """
    wrong: list[str] = []
    number = 0
    while True:
        offer: list[Any] = [None, None, None]  # path, content, what is wrong
        if dist.get_rank() == 0 and number < len(candidates):
            offer[0] = candidates[number]
            try:
                offer[1] = read_content(candidates[number])
            except CheckpointError as error:
                offer[2] = str(error)
        dist.broadcast_object_list(offer, src=0)
        path, content, failure = offer
        if path is None:
            return None, wrong
        damage = [failure] if failure else _damage(path, content["files"])
        if not damage:
            return Found(path, content["progress"], tuple(content["extra"]), content["optimizer"]), wrong
        wrong.append(damage[0])
        number += 1


def _damage(path: Path, files: dict[str, dict[str, Any]]) -> list[str]:
    """Return what is wrong with the files, the same on all ranks."""
    by_size = sorted(files, key=lambda name: (-files[name]["bytes"], name))
    mine = by_size[dist.get_rank() :: dist.get_world_size()]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, [str(CheckpointError(p)) for p in problems(path, files, mine)])
    return [problem for each in found for problem in each]


def candidates_of(folder: Path, named: str | None) -> list[Path]:
    """Return the checkpoints to try, newest first: those of a run, or, while it has none, the one named."""
    own = checkpoints(folder)
    return own or ([Path(named)] if named else [])


def load_checkpoint(found: Found, parts: Parts, *, training: bool, extra: tuple[str, ...] = ()) -> list[str]:
    """Fill this rank's stages from a checkpoint written in any layout; return what a person should know.

    ``training``: optimizer, all extra states and random generators too. ``extra``: extra states to fill besides.
    Raises: CheckpointError: the checkpoint is of another model.
    """
    if training:
        extra = tuple(sorted(set(found.extra) & set(parts.extra_states)))
    if parts.ema is not None:
        parts.ema.wait()  # it may still read the weights of the last step
    state = whole_state(parts, loading=True, extra=extra, optimizer=training and found.optimizer)
    kept = {} if found.optimizer else _take_module_states(state["model"])
    try:
        state = dist_checkpointing.load(state, str(found.path))
    except (Exception, CheckpointException) as error:  # many kinds, and torch's own is no Exception
        reason = (str(error).strip().splitlines() or [""])[-1][:200]
        raise CheckpointError(
            f"{found.path} does not fit this model ({reason}); use the recipe it was trained with"
        ) from error
    for stage, chunk in parts.chunks.items():
        chunk.load_state_dict(state["model"][f"stage{stage}"] | kept.get(f"stage{stage}", {}))
    for name in extra:
        parts.extra_states[name].load_state(state["extra"][name])
    return _resume_training(found, parts, state, extra) if training else []


def _take_module_states(model: dict[str, Any]) -> dict[str, Any]:
    """Take what is no tensor (TE's FP8 scales) out of a model's sharded state and return it as it is: weights that
    were imported come without."""
    taken: dict[str, Any] = {}
    for stage, state in model.items():
        names = [name for name, value in state.items() if isinstance(value, ShardedObject)]
        taken[stage] = {name: state.pop(name).data for name in names}
    return taken


def _resume_training(found: Found, parts: Parts, state: dict[str, Any], extra: tuple[str, ...]) -> list[str]:
    if found.optimizer:
        parts.optimizer.load_state_dict(state["optimizer"])
    else:
        parts.optimizer.reload_model_params()  # master weights are those just loaded; moments begin at zero
    notes = []
    for name in sorted(set(parts.extra_states) - set(extra)):
        parts.extra_states[name].begin_anew()
        notes.append(f"{found.path} holds no {name}: it begins anew from the weights loaded")
    if left := sorted(set(found.extra) - set(parts.extra_states)):
        notes.append(f"{found.path} also holds {', '.join(left)}, which this recipe does not keep: not loaded")
    if found.optimizer:
        restore_random_state((found.path / RANDOM).read_bytes(), parts.layout, parts.device)
    return notes
