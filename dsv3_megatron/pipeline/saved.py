"""What a state is to a checkpoint: boxes of named tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Entry:
    """A box of a named tensor, and the memory of this rank that holds it.

    Saving reads the memory and loading fills it in place, so it is a view where the state itself is meant.

    Attributes:
        key: the tensor's name, the same in every layout.
        whole: the tensor's shape.
        start: the box's first corner.
        tensor: the box's numbers, in its shape; on any device, in any dtype that holds what is stored.
        writes: whether this rank saves it; of all that hold a box, exactly one does.
        group: the ranks that hold the same box: the first reads it for all. None: every rank reads for itself.
    """

    key: str
    whole: tuple[int, ...]
    start: tuple[int, ...]
    tensor: Tensor
    writes: bool = True
    group: dist.ProcessGroup | None = None

    @property
    def extent(self) -> tuple[int, ...]:
        """The box's size along every axis."""
        return tuple(self.tensor.shape)

    @property
    def is_read_here(self) -> bool:
        """Whether this rank is to read the box, for itself or for all that hold it."""
        return self.group is None or self.group.rank() == 0
