"""Making a process group is one message a rank, and a connection only to a rank that it exchanges something with."""

import os
import resource

import psutil
import pytest
import torch
import torch.distributed as dist

from parallel.errors import LayoutError
from parallel.groups import allow_open_files, build_groups, start_processes
from parallel.layout import Layout
from parallel.world import World
from testing.counting.collectives import counted_collectives
from testing.counting.tally import Tally
from testing.ranks import run_ranks

WORLD = 8


def connections():
    """Return how many TCP connections this process has."""
    return sum(each.status == psutil.CONN_ESTABLISHED for each in psutil.Process().net_connections("tcp"))


def make_groups(lazy):
    """Make the groups of a layout, then exchange something with one neighbour; return what that took."""
    os.environ.pop("TORCH_GLOO_LAZY_INIT", None)
    if lazy is not None:
        os.environ["TORCH_GLOO_LAZY_INIT"] = lazy
    tally, world = Tally("start"), World.from_environment()
    before = connections()
    with counted_collectives(tally):
        start_processes(world, torch.device("cpu"), timeout_seconds=60)
        groups = build_groups(Layout(tp=1, cp=1, dp=4, pp=2, ep=2, expert_tp=1, expert_dp=2), mirrored=True)
        found = {"started": tally.of("start"), "connections": connections() - before}
        wait_for_all(world)
        dist.all_reduce(torch.zeros(1), group=groups.ep)
        found["after an exchange of two"] = connections() - before
        wait_for_all(world)
        os.environ.pop("TORCH_GLOO_LAZY_INIT", None)
        return found


def wait_for_all(world):
    """Wait until all ranks are here, over the store: a barrier would connect them."""
    store = dist.distributed_c10d._get_default_store()
    key = f"here/{store.add(f'{world.rank}', 1)}"
    store.set(f"{key}/{world.rank}", "")
    store.wait([f"{key}/{rank}" for rank in range(world.size)])


@pytest.fixture(scope="module")
def made():
    """What the groups took each rank: as they are made here, and where gloo connects all members at once."""
    return run_ranks(WORLD, make_groups, [None, "0"])


def test_making_a_group_is_one_message_to_the_store(made):
    for rank in made[0]:
        started = rank["started"]
        messages = sum(number for name, number in started.items() if name.startswith("store/"))
        assert messages == started["store/set"] == started["groups/joined"] + 1  # the default group
        assert rank["connections"] == 1  # to the store


def test_a_rank_connects_when_it_exchanges_something(made):
    assert {rank["after an exchange of two"] for rank in made[0]} == {2}


def test_the_environment_brings_full_meshes_back(made):
    for rank in made[1]:
        assert rank["started"]["store/get"] > 5 * WORLD and rank["connections"] > 3 * WORLD


def test_no_group_has_a_twin_over_gloo(made):
    assert len({rank["started"]["groups/called"] for rank in made[0]}) == 1
    assert max(rank["started"]["groups/joined"] for rank in made[0]) <= 20


@pytest.mark.parametrize(("limits", "size", "expected"), [((300, 9000), 2560, 2560), ((4000, 9000), 2560, 4000)])
def test_a_process_may_have_a_connection_to_every_rank(monkeypatch, limits, size, expected):
    held = [limits]
    monkeypatch.setattr(resource, "getrlimit", lambda what: held[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda what, to: held.append(to))
    allow_open_files(size)
    assert held[-1] == (expected, 9000)


def test_too_few_open_files_are_told_before_ranks_meet(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda what: (300, 1024))
    monkeypatch.setattr(dist, "rendezvous", None)
    with pytest.raises(LayoutError, match=r"open files: 2,560 are needed.*hard limit is 1,024 .ulimit -Hn."):
        start_processes(World(0, 2048, 0), torch.device("cpu"))
