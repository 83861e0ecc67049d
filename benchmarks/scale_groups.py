"""Process groups: those of 2,048 ranks on a world without messages, and real starts; a part of at_scale.py."""

from __future__ import annotations

import os
import time
from statistics import median
from typing import Any
from unittest.mock import patch

import psutil

from benchmarks.scale_lives import words_of
from benchmarks.scale_table import TARGET_RANKS
from testing.counting.tally import Tally
from testing.ranks import run_ranks

STARTED, TURNS = (8, 16, 32), 3
MODES = {"mesh": "0", "lazy": "1"}  # TORCH_GLOO_LAZY_INIT


def groups_at_scale() -> dict[str, Any]:
    """Return what making the groups of recipe=dsv3_671b takes on rank 0, and which groups it is in."""
    return groups_of(("recipe=dsv3_671b",), TARGET_RANKS)


def groups_of(words: tuple[str, ...], world: int) -> dict[str, Any]:
    """Return calls of ``new_group`` in a start, their seconds, and [description, ranks] of the groups of rank 0."""
    return run_ranks(1, _groups_of, [(words, world)], timeout_seconds=300)[0][0]


def _groups_of(case: tuple[tuple[str, ...], int]) -> dict[str, Any]:
    # torch and megatron-core, which a process that only starts ranks has no need of
    import torch.distributed as dist

    from launcher.command_line.compose import compose
    from parallel.fake_world import fake_world
    from parallel.groups import build_groups

    words, world = case
    recipe = compose(list(words))
    real, calls, joined = dist.new_group, 0, []

    def new_group(ranks: list[int] | None = None, backend: str | None = None, **others: Any) -> Any:
        nonlocal calls
        calls += 1
        members = list(range(world)) if ranks is None else ranks
        if 0 in members:
            joined.append([others.get("group_desc") or "undefined", len(members)])
        return real(ranks, **others)  # gloo's too: in such a world no message could connect it

    with (
        fake_world(world),
        patch.object(dist, "new_group", new_group),
        patch.object(dist, "get_backend", lambda *group: "gloo"),
    ):
        begin = time.perf_counter()
        build_groups(recipe.layout(world), mirrored=recipe.placement().kind == "mirror")
        seconds = time.perf_counter() - begin
    return {"calls": calls, "seconds": seconds, "joined": [["default_pg", world], *joined]}


def starts() -> dict[str, dict[str, Any]]:
    """Return what it takes real ranks to start and to make their groups, by world: connected at their first message
    ("lazy"), and all members of a group at once ("mesh"). Medians of turns, of the slowest or the busiest rank."""
    found = {}
    for world in STARTED:
        turns = run_ranks(world, _start, [(words_of(world), mode) for mode in MODES for _ in range(TURNS)])
        found[str(world)] = {
            mode: {
                what: median(max(rank[what] for rank in turn) for turn in turns[number * TURNS : (number + 1) * TURNS])
                for what in ("seconds", "messages", "connections")
            }
            for number, mode in enumerate(MODES)
        }
    return found


def _start(case: tuple[tuple[str, ...], str]) -> dict[str, float]:
    # torch and megatron-core, which a process that only starts ranks has no need of
    import torch
    import torch.distributed as dist

    from launcher.command_line.compose import compose
    from parallel.groups import build_groups, start_processes, stop_processes
    from parallel.world import World
    from testing.counting.collectives import counted_collectives

    words, mode = case
    os.environ["TORCH_GLOO_LAZY_INIT"] = MODES[mode]
    recipe, world, tally = compose(list(words)), World.from_environment(), Tally("start")
    with counted_collectives(tally):
        begin = time.perf_counter()
        start_processes(world, torch.device("cpu"))
        build_groups(recipe.layout(world.size), mirrored=recipe.placement().kind == "mirror")
        dist.barrier()  # all have started
        seconds = time.perf_counter() - begin
        messages = sum(tally.of("start", "store/").values())
        connections = sum(each.status == psutil.CONN_ESTABLISHED for each in psutil.Process().net_connections("tcp"))
        stop_processes()
    return {"seconds": seconds, "messages": messages, "connections": connections}


def mesh_messages(sizes: list[int]) -> int:
    """Return the messages to the store that a rank sends for gloo groups of these sizes, where each connects all its
    members as it is made: it tells its own address once, and waits for and gets that of every member."""
    return sum(1 + 2 * size for size in sizes)


def mesh_connections(sizes: list[int]) -> int:
    """Return the connections that a rank then has: one to every other member of every group."""
    return sum(size - 1 for size in sizes)
