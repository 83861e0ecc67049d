"""A world of any size in which this process is one rank and nothing is sent; what NCCL refuses is refused."""

from __future__ import annotations

import os
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

    def all_gather_object(object_list: list, obj: Any, group: Any = None) -> None:
        object_list[:] = [obj] * len(object_list)

    def gather_object(obj: Any, object_gather_list: list | None = None, *args: Any, **kwargs: Any) -> None:
        if object_gather_list is not None:
            object_gather_list[:] = [obj] + [_of_others(obj)] * (len(object_gather_list) - 1)

    def scatter_object_list(output: list, objects: list | None, *args: Any, **kwargs: Any) -> None:
        output[0] = objects[0] if objects is not None else type(output[0])()

    import dsv3_megatron.checkpoint.index as index  # after the project has adapted megatron-core

    with ExitStack() as stack:
        of_torchrun = {"RANK": world.rank, "WORLD_SIZE": world.size, "LOCAL_RANK": world.local_rank}
        stack.enter_context(patch.dict(os.environ, {name: str(value) for name, value in of_torchrun.items()}))
        # It puts the shares of all ranks together, of which there is one here.
        stack.enter_context(patch.object(index, "check_whole", lambda boxes: None))
        for name, stand_in in (
            ("init_process_group", init),
            ("rendezvous", lambda *a, **k: iter([(_store_of_all(), world.rank, world.size)])),
            ("barrier", barrier),
            ("broadcast_object_list", lambda objects, *a, **k: None),
            ("all_gather_object", all_gather_object),
            ("gather_object", gather_object),
            ("scatter_object_list", scatter_object_list),
        ):
            stack.enter_context(patch.object(dist, name, stand_in))
        yield


def _of_others(mine: Any) -> Any:
    """Return what the other ranks hand in where this one hands in ``mine``: nothing to write, else the same."""
    if isinstance(mine, dict):  # which boxes its files hold
        return {}
    return ({}, {}, None) if isinstance(mine, tuple) else mine  # places, files, failure of a save


def _must_be_current(device: torch.device) -> None:
    if torch.cuda.current_device() != device.index:
        raise StrawError(f"the current device is cuda:{torch.cuda.current_device()}, not the rank's {device}")


def _store_of_all() -> dist.Store:
    """Return a store in which the other ranks have left word that they are here (parallel.groups)."""
    store = dist.HashStore()
    for prefix in ("", "start_0/"):
        store.set(f"{prefix}all have arrived", "")
    return store
