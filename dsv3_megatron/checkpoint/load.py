"""Filling a rank from a checkpoint, whatever layout wrote it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from dsv3_megatron.checkpoint.find import Found
from dsv3_megatron.checkpoint.manifest import RANDOM
from dsv3_megatron.checkpoint.masters import masters_from_weights, parts_of, weights_from_masters
from dsv3_megatron.checkpoint.state import is_te_state, restore_random_state, whole_state
from dsv3_megatron.pipeline.parts import Parts
from parallel.errors import CheckpointError


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
    wanted = dict(_wanted(state))
    try:
        state = dist_checkpointing.load(state, str(found.path))
    except (Exception, CheckpointException) as error:  # many kinds, and torch's own is no Exception
        reason = _misfit(found.path, wanted) or (str(error).strip().splitlines() or [""])[-1][:200]
        raise CheckpointError(
            f"{found.path} does not fit this model ({reason}); use the recipe it was trained with"
        ) from error
    for stage, chunk in parts.chunks.items():
        missing, unexpected = chunk.load_state_dict(state["model"][f"stage{stage}"], strict=False)
        assert not unexpected and all(map(is_te_state, missing)), (missing, unexpected)
    for name in extra:
        parts.extra_states[name].load_state(state["extra"][name])
    return _resume_training(found, parts, state, extra) if training else []


def _wanted(state: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield key and whole shape of every tensor that this rank asks of a checkpoint."""
    for value in nested_values(state):
        pieces = nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value]
        yield from ((piece.key, piece.global_shape) for piece in pieces if isinstance(piece, ShardedTensor))


def _misfit(checkpoint: Path, wanted: dict[str, tuple[int, ...]]) -> str:
    """Return the first tensor that a checkpoint lacks or has in another shape, "" if there is none."""
    stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    if missing := sorted(wanted.keys() - stored.keys()):
        return f"it holds no {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
    for key, shape in wanted.items():
        size = getattr(stored[key], "size", ())  # bytes have none
        if tuple(size) != shape:
            return f"{key} has shape {tuple(size)}, not {shape}"
    return ""


def _resume_training(found: Found, parts: Parts, state: dict[str, Any], extra: tuple[str, ...]) -> list[str]:
    if found.optimizer:
        with _own_options(parts.optimizer):
            parts.optimizer.load_state_dict(state["optimizer"])
        weights_from_masters(parts.optimizer, parts.ddps.values())
    else:
        masters_from_weights(parts.optimizer, _loaded_weights(parts, state["model"]))
    notes = []
    for name in sorted(set(parts.extra_states) - set(extra)):
        parts.extra_states[name].begin_anew()
        notes.append(f"{found.path} holds no {name}: it begins anew from the weights loaded")
    if left := sorted(set(found.extra) - set(parts.extra_states)):
        notes.append(f"{found.path} also holds {', '.join(left)}, which this recipe does not keep: not loaded")
    if found.optimizer:
        restore_random_state((found.path / RANDOM).read_bytes(), parts.layout, parts.device)
    return notes


@contextmanager
def _own_options(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Leave the options of this optimizer's AdamW what the recipe says, whatever is loaded inside; the step it counts
    comes from the checkpoint.

    megatron-core puts the stored groups of parameters, in its own groups' order, in the place of its own (0.16.1).
    A recipe that was changed would have no effect, and every AdamW reads keys of its own there: TE's and Apex's wants
    ``bias_correction``, ours has none.
    """
    own = [[dict(group) for group in part.optimizer.param_groups] for part in parts_of(optimizer)]
    yield
    for part, options in zip(parts_of(optimizer), own):
        for group, mine in zip(part.optimizer.param_groups, options):
            group.update((key, value) for key, value in mine.items() if key not in ("params", "step"))


def _loaded_weights(parts: Parts, model: dict[str, Any]) -> dict[torch.nn.Parameter, Tensor]:
    """Return what was loaded for every parameter."""
    return {
        parameter: model[f"stage{stage}"][name]
        for stage, chunk in parts.chunks.items()
        for name, parameter in chunk.named_parameters()
    }
