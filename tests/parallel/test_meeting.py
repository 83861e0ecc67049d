"""Ranks of one host listen to nobody else: neither their store nor gloo has a port that another host reaches."""

import os

import psutil
import pytest
import torch
import torch.distributed as dist

from parallel.groups import start_processes, stop_processes
from parallel.meeting import listen_at_home
from parallel.world import World
from testing.ports import free_port
from testing.ranks import run_ranks

WORLD = 2


def meet(case):
    """Meet with another rank and exchange something; return the addresses at which this process listens."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "LOCAL_WORLD_SIZE"):
            patch.delenv(name, raising=False)
        patch.setenv("MASTER_ADDR", case["host"])
        patch.setenv("MASTER_PORT", str(case["port"]))
        patch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")  # rank 0 serves the store
        if case["at_home"]:
            patch.setenv("LOCAL_WORLD_SIZE", str(WORLD))
        start_processes(World.from_environment(), torch.device("cpu"), timeout_seconds=60)
        try:
            total = torch.ones(1)
            dist.all_reduce(total)
            assert total == WORLD
            listening = [c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
            return listening, os.environ.get("NCCL_SOCKET_IFNAME")
        finally:
            stop_processes()


def test_ranks_of_one_host_listen_on_its_loopback_interface_alone():
    [met] = run_ranks(WORLD, meet, [{"host": "127.0.0.1", "port": free_port(), "at_home": True}])
    for listening, interface in met:
        assert listening and all(address.startswith("127.") for address in listening)
        assert interface == "lo"


def test_ranks_that_may_be_on_several_hosts_choose_no_interface():
    [met] = run_ranks(WORLD, meet, [{"host": "localhost", "port": free_port(), "at_home": False}])
    assert [interface for _, interface in met] == [None, None]


def test_an_interface_that_the_user_chose_stays(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "")
    listen_at_home(World(0, 4, 0))
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0" and os.environ["NCCL_SOCKET_IFNAME"] == ""


@pytest.mark.parametrize(
    ("ranks", "local", "agents", "is_open"),
    [(4, "4", "True", True), (4, "4", "False", False), (4, "2", "True", False), (1, None, None, False)],
)
def test_an_agent_that_other_hosts_reach_is_known(monkeypatch, ranks, local, agents, is_open):
    monkeypatch.setattr("parallel.world.socket.if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    for name, value in (("LOCAL_WORLD_SIZE", local), ("TORCHELASTIC_USE_AGENT_STORE", agents)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert World(0, ranks, 0).is_open is is_open
    monkeypatch.setattr("parallel.world.socket.if_nameindex", lambda: [(1, "lo")])
    assert not World(0, ranks, 0).is_open  # a host that has no other interface
