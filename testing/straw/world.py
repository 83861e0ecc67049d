"""A world of any size in which this process is one rank and nothing is sent; what NCCL refuses is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
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

    def all_gather_object(found: list, mine: Any, group: Any = None) -> None:
        found[:] = [mine] * len(found)

    def gather_object(mine: Any, found: list | None = None, dst: Any = None, group: Any = None) -> None:
        if found is not None:
            found[:] = [mine] * len(found)

    with ExitStack() as stack:
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


def _must_be_current(device: torch.device) -> None:
    if torch.cuda.current_device() != device.index:
        raise StrawError(f"the current device is cuda:{torch.cuda.current_device()}, not the rank's {device}")
