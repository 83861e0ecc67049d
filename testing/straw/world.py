"""A world of any size in which this process is one rank and nothing is sent; what NCCL refuses is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import default_planner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel.world import World
from testing.straw.gpu import StrawError


@contextmanager
def straw_world(world: World, device: torch.device) -> Iterator[None]:
    """Let ``init_process_group`` make the world of straw inside, if it is asked as for GPUs."""
    real = dist.init_process_group

    def init(backend: str, *, store: Any, rank: int, world_size: int, timeout: Any, **others: Any) -> None:
        if backend != "cpu:gloo,cuda:nccl" or others:
            raise StrawError(f"init_process_group({backend!r}, {others}): not as for GPUs")
        _must_be_current(device)
        real("fake", store=FakeStore(), rank=rank, world_size=world_size)

    def barrier(*args: Any, **kwargs: Any) -> None:
        _must_be_current(device)  # NCCL allocates its flag on the current device

    def all_gather_object(object_list: list, obj: Any, group: Any = None) -> None:
        object_list[:] = [obj] * len(object_list)

    def gather_object(obj: Any, object_gather_list: list | None = None, *args: Any, **kwargs: Any) -> None:
        if object_gather_list is not None:
            object_gather_list[:] = [obj] + [_of_others(obj)] * (len(object_gather_list) - 1)

    import megatron.core.dist_checkpointing.state_dict_utils as states  # after the project has adapted it

    with ExitStack() as stack:
        # It puts the shares of all ranks together, of which there is one here.
        stack.enter_context(patch.object(states, "validate_sharding_integrity", lambda *a, **k: None))
        good = default_planner._validate_global_plan([], Metadata({}))  # True in torch 2.11, no errors in 2.13
        stack.enter_context(patch.object(default_planner, "_validate_global_plan", lambda *a: good))
        for name, stand_in in (
            ("init_process_group", init),
            ("rendezvous", lambda *a, **k: iter([(dist.HashStore(), world.rank, world.size)])),
            ("barrier", barrier),
            ("broadcast_object_list", lambda objects, *a, **k: None),
            ("all_gather_object", all_gather_object),
            ("gather_object", gather_object),
        ):
            stack.enter_context(patch.object(dist, name, stand_in))
        yield


def _of_others(mine: Any) -> Any:
    """Return what the other ranks hand in where this one hands in ``mine``: nothing to write, else the same."""
    from dsv3_megatron.checkpoint.write import Written

    if isinstance(mine, SavePlan):
        return replace(mine, items=[])
    if isinstance(mine, tuple) and isinstance(mine[0], Written):
        return Written(), None
    return mine


def _must_be_current(device: torch.device) -> None:
    if torch.cuda.current_device() != device.index:
        raise StrawError(f"the current device is cuda:{torch.cuda.current_device()}, not the rank's {device}")
