"""Saving and loading a run's state, in any layout: megatron-core's distributed checkpoints inside our manifest."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.checkpoint.api import CheckpointException

from dsv3_megatron.checkpoint.manifest import checkpoints, folder_name, write_manifest
from parallel.errors import CheckpointError


def _metadata(groups: ProcessGroupCollection) -> dict[str, Any]:
    """How states are cut: fully reshardable, so that any layout loads what any other wrote."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": groups.dp_cp,
    }


def _state(
    chunks: dict[int, GPTModel], optimizer: MegatronOptimizer | None, groups: ProcessGroupCollection, *, loading: bool
) -> dict[str, Any]:
    metadata = _metadata(groups)
    state: dict[str, Any] = {"model": {f"stage{s}": _chunk_state(chunk, metadata) for s, chunk in chunks.items()}}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=loading, metadata=metadata)
    return state


def _chunk_state(chunk: GPTModel, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return a stage's sharded state. An embedding of another stage on this rank is saved with that one."""
    borrowed = chunk.mtp_process and "embedding" not in dict(chunk.named_children())
    chunk.mtp_process, before = chunk.mtp_process and not borrowed, chunk.mtp_process
    try:
        return chunk.sharded_state_dict(metadata=metadata)
    finally:
        chunk.mtp_process = before


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    chunks: dict[int, GPTModel],
    optimizer: MegatronOptimizer,
    groups: ProcessGroupCollection,
    progress: dict[str, Any],
    keep: int,
) -> Path:
    """Write ``folder/step_XXXXXXXX`` from all ranks and return it; afterwards remove all but the ``keep`` newest.

    Written beside its place and renamed: a torn write leaves no checkpoint, and older ones go only after the rename.
    Raises: CheckpointError: the disk refused.
    """
    target = folder / folder_name(step)
    partial = folder / f".{target.name}.partial"
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    _prepare_states(optimizer)
    try:
        dist_checkpointing.save(_state(chunks, optimizer, groups, loading=False), str(partial))
        failure = None
    except (Exception, CheckpointException) as error:  # torch's own is no Exception
        failure = error
    if _any_rank(failure is not None):
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        reason = f"{type(failure).__name__}: {str(failure).splitlines()[0]}" if failure else "another rank failed"
        raise CheckpointError(f"{target} could not be written ({reason}); free space under {folder}")
    if first:
        write_manifest(partial, progress)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        for old in checkpoints(folder)[keep:]:
            shutil.rmtree(old, ignore_errors=True)
    dist.barrier()
    return target


def _any_rank(failed: bool) -> bool:
    flag = torch.tensor(int(failed), device=torch.cuda.current_device())
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def _prepare_states(optimizer: MegatronOptimizer) -> None:
    """Give Adam its moments where no step was taken yet: a checkpoint of step 0 holds zeros."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not part.optimizer.state:
            part.init_state_fn(part.optimizer, part.config)


def load_checkpoint(
    path: Path, *, chunks: dict[int, GPTModel], optimizer: MegatronOptimizer | None, groups: ProcessGroupCollection
) -> None:
    """Fill this rank's stages, and the optimizer where one is given, from a checkpoint written in any layout.

    The caller has checked the manifest. Raises: CheckpointError: the checkpoint is of another model.
    """
    try:
        state = dist_checkpointing.load(_state(chunks, optimizer, groups, loading=True), str(path))
    except (Exception, CheckpointException) as error:  # many kinds, and torch's own is no Exception
        reason = (str(error).strip().splitlines() or [""])[-1][:200]
        raise CheckpointError(
            f"{path} does not fit this model ({reason}); use the recipe it was trained with"
        ) from error
    for stage, chunk in chunks.items():
        chunk.load_state_dict(state["model"][f"stage{stage}"])
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
