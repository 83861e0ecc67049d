"""One thing that gloo does otherwise than NCCL, and that only weights held in FP8 meet.

megatron-core gathers FP8 weights and BF16 ones in one coalesced call. NCCL sends each tensor as it is; gloo lays them
in one buffer of the first one's type and returns other bytes than it was given (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor


class _Works:
    """Several operations as one."""

    def __init__(self, works: list[Any]):
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()


def gather_types_apart() -> None:
    """Let a coalesced all-gather be one for each type of numbers."""
    for name in ("allgather_into_tensor_coalesced", "all_gather_single_coalesced"):  # the latter from torch 2.13 on
        if gather := getattr(dist.ProcessGroup, name, None):
            setattr(dist.ProcessGroup, name, _by_type(gather))


def _by_type(gather: Callable) -> Callable:
    def gather_by_type(group: Any, outputs: list[Tensor], inputs: list[Tensor], *options: Any) -> Any:
        works = []
        for dtype in dict.fromkeys(part.dtype for part in inputs):
            mine = [i for i, part in enumerate(inputs) if part.dtype is dtype]
            works.append(gather(group, [outputs[i] for i in mine], [inputs[i] for i in mine], *options))
        return works[0] if len(works) == 1 else _Works(works)

    return gather_by_type
