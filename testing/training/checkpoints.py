"""Comparing checkpoints bit for bit, whatever layout wrote them."""

from pathlib import Path

import torch
from megatron.core.dist_checkpointing import load_plain_tensors
from torch import Tensor

from parallel.groups import start_processes, stop_processes
from parallel.world import World


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint, whole, by name."""
    start_processes(World(0, 1, 0), torch.device("cpu"))
    try:
        return {k: v for k, v in load_plain_tensors(str(checkpoint)).items() if isinstance(v, Tensor)}
    finally:
        stop_processes()


def assert_same_tensors(mine: Path, theirs: Path) -> None:
    """Weights, biases and optimizer state of two checkpoints are the same, bit for bit."""
    mine, theirs = tensors(mine), tensors(theirs)
    assert mine.keys() == theirs.keys() and len(mine) > 50
    differing = [key for key in mine if not torch.equal(mine[key], theirs[key])]
    assert not differing, differing
