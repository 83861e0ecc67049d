"""Layout -> process groups. The only file that starts a process group or creates one."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from parallel.errors import LayoutError, RankFault
from parallel.layout import GROUPS, Layout
from parallel.meeting import listen_at_home, open_store
from parallel.world import World, host_name

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

OTHER_FILES = 512  # that a process has open beside its connections to other ranks: libraries, data, checkpoints
# The group of each name of parallel.layout.GROUPS in megatron-core's collection.
_FIELD = {
    "tp_cp": None,
    "tp_ep": None,
    "stage": None,
    "expert_stage": None,
    "expert_tp": "expt_tp",
    "expert_dp": "expt_dp",
}

JOINED = "joined"  # key of the store: there once any rank is past what it could refuse alone


def start_processes(world: World, device: torch.device, timeout_seconds: float = 600) -> None:
    """Join the world's default process group: gloo on CPUs, NCCL on GPUs.

    One process needs no launcher: it gets a store of its own. The timeout is that of meeting, and of the group's
    collectives, which raise after it, until :func:`set_timeouts`.
    ``device`` becomes the current one: megatron-core, Transformer Engine and ``device="cuda"`` all mean that. It is not
    given to the process group (``device_id``): that opens the group's communicator at once, and NCCL would then carry
    the messages of all pairs of a pipeline on one stream, in one order, where the proof that no schedule can deadlock
    (parallel.pipeline.validate) takes each pair's messages to have a queue of their own.

    Gloo, which every group has for what lies in host memory, connects two ranks at their first message. By default it
    connects all members of a group as the group is made, for which each asks the store for the address of each: of
    2,048 ranks, 6,500 connections a rank and 27 million messages to one store (docs/scale.md).
    TORCH_GLOO_LAZY_INIT=0 in the environment brings that back.
    Raises: RankFault: not all ranks have come in time, or one has left. LayoutError: too few open files are allowed.
    """
    allow_open_files(world.size + OTHER_FILES)
    listen_at_home(world)
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")  # torch reads it as each group is made (2.13)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_seconds)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if world.size == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        try:
            store = open_store(world, timeout_seconds)
            store.set(JOINED, str(world.rank))
            dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
            _wait_for_all(store, world, timeout)
        except RuntimeError as error:  # torch's for all that a store or gloo meets
            why = str(error).strip().partition("\n")[0]
            raise RankFault(
                f"rank {world.rank} on {host_name()} could not meet all {world.size:,} ranks ({why}); "
                f"run.start_seconds = {timeout_seconds:g}"
            ) from error


def _wait_for_all(store: dist.Store, world: World, timeout: timedelta) -> None:
    """Wait until every rank is here: making the group does not, where ranks connect at their first message."""
    if store.add("arrived", 1) == world.size:
        store.set("all have arrived", "")
    store.wait(["all have arrived"], timeout)


def allow_open_files(count: int) -> None:
    """Let this process have so many open files, connections among them: rank 0 speaks with every other rank, and the
    usual limit is 1,024. Raises LayoutError: an administrator allows fewer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return
    if hard != resource.RLIM_INFINITY and hard < count:
        raise LayoutError(
            f"open files: {count:,} are needed, of which {OTHER_FILES:,} beside the connections of all ranks, but the "
            f"hard limit is {hard:,} (ulimit -Hn); have it raised"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def set_timeouts(seconds: float) -> None:
    """Let collectives of this rank's groups, as many as there are by now, raise after so long.

    torch gives every group a time of its own when it is made, 10 minutes under NCCL and 30 under gloo, whatever the
    default group has (2.13).
    """
    from torch.distributed.distributed_c10d import _set_pg_timeout, _world  # torch has no public name for them

    for group in list(_world.pg_map):
        if dist.get_backend(group) != "fake":  # whose collectives end at once
            _set_pg_timeout(timedelta(seconds=seconds), group)


def build_groups(layout: Layout, *, mirrored: bool = False) -> ProcessGroupCollection:
    """Create every group of the layout and return megatron-core's collection of those this rank is in.

    They are also registered as megatron-core's global state, which some of its modules still read. ``mirrored`` (under
    DualPipe): pipeline ranks r and P - 1 - r hold the same stages, so the data-parallel groups of the collection, over
    which gradients are reduced and optimizer states sharded, are the union of both ranks' groups.
    """
    from megatron.core import parallel_state  # seconds to import, and only where groups are made
    from megatron.core.process_groups_config import ProcessGroupCollection

    assert layout.world_size == dist.get_world_size(), (layout, dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.expert_tp,
        order="tp-cp-ep-dp-pp",
        create_gloo_process_groups=False,  # twins for an optimizer that gathers its states over gloo; ours does not
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    _check_members(groups, layout)
    if mirrored:
        groups.dp = _union_group(layout, "dp")
        groups.dp_cp = groups.intra_dp_cp = _union_group(layout, "dp_cp")
        groups.expt_dp = groups.intra_expt_dp = _union_group(layout, "expert_dp")
    return groups


def holder_groups(
    layout: Layout, groups: ProcessGroupCollection, *, mirrored: bool = False
) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Return the ranks that hold the same dense parameters, and the same experts, as this one, or parts of them: the
    data-parallel ranks of all its tensor-parallel ranks. All ranks together; groups are made only where tensors are
    split. ``mirrored``: as for :func:`build_groups`."""

    def united(name: str) -> dist.ProcessGroup:
        return _group_of((layout.mirrored(each) if mirrored else each for each in layout.groups(name)), name)

    dense = groups.dp_cp if layout.tp == 1 else united("stage")
    experts = groups.expt_dp if layout.expert_tp == 1 else united("expert_stage")
    return dense, experts


def connect_groups(groups: Iterable[dist.ProcessGroup], device: torch.device) -> None:
    """Sum a number once over each group, so that no later collective of theirs holds the host.

    Under NCCL a group's first collective makes its communicator and holds the host until all members call it. Left to
    the first reduction of gradients, ranks that hold the same stages and finish them at different places of a schedule
    can wait for each other for ever (parallel.pipeline.validate). All ranks name groups of the same kinds in the same
    order.
    """
    for group in dict.fromkeys(groups):
        if group.size() > 1:
            dist.all_reduce(torch.zeros(1, device=device), group=group)


def _union_group(layout: Layout, name: str) -> dist.ProcessGroup:
    """Return this rank's group ``name`` united with its mirror."""
    return _group_of((layout.mirrored(members) for members in layout.groups(name)), f"{name} with its mirror")


def _group_of(members_of_all: Iterable[tuple[int, ...]], description: str) -> dist.ProcessGroup:
    """Return this rank's of these groups. Every rank creates all of them, in one order."""
    mine = None
    for members in dict.fromkeys(members_of_all):
        group = dist.new_group(members, group_desc=description)
        mine = group if dist.get_rank() in members else mine
    assert mine is not None, f"no group holds rank {dist.get_rank()}"
    return mine


def _check_members(groups: ProcessGroupCollection, layout: Layout) -> None:
    """Assert that the groups made are the groups planned: the layout is what plans and tests reason about."""
    rank = dist.get_rank()
    for name in GROUPS:
        field = _FIELD.get(name, name)
        if field is None or not hasattr(groups, field):
            continue
        made = tuple(dist.get_process_group_ranks(getattr(groups, field)))
        assert made == layout.group(name, rank), (name, made, layout.group(name, rank))


def stop_processes() -> None:
    """Leave all groups. Always called at the end: gloo aborts a process that exits inside its default group."""
    from megatron.core import parallel_state  # as above

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
