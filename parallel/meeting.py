"""How the ranks of a start meet: the store that they read and write, and where this host listens for other hosts.

Whoever reaches a port of a training job can break it, and through torch's elastic agent with a c10d rendezvous, which
unpickles what its store holds, run programs as its user. So ranks that are all on one host listen on its loopback
interface alone; docs/security.md says what is left open over several hosts.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from datetime import timedelta

import torch.distributed as dist

from parallel.world import AGENTS_STORE, LOOPBACK, NOT_SHARED, World

_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def listen_at_home(world: World) -> None:
    """Let gloo and NCCL listen on the loopback interface alone where torchrun has started all ranks on this host.

    Before a process group is made. What the user has set in the environment stays.
    """
    if not world.is_at_home:
        return
    names = {name for _, name in socket.if_nameindex()}
    if home := next((name for name in LOOPBACK if name in names), None):
        for variable in _INTERFACES:
            os.environ.setdefault(variable, home)


def open_store(world: World, timeout_seconds: float) -> dist.Store:
    """Return the store by which the ranks of this start meet, in a part that no earlier start of theirs has written to.

    torchrun --max-restarts on one node keeps its store, in which restarted ranks would find the addresses of the dead
    and wait for them for ever (torch 2.13); so do agents with a static rendezvous, which share their store whatever
    ``NOT_SHARED`` says. There all agents start their ranks again equally often: the ranks of one have lost those of
    the others. With a c10d rendezvous over several nodes the count differs from agent to agent; set ``NOT_SHARED`` to 1
    there, which gives every start a new store, in the process of rank 0.
    """
    timeout = timedelta(seconds=timeout_seconds)
    is_agents = os.environ.get(AGENTS_STORE) == "True"
    store = None if is_agents or world.rank else _store_at_home(world, timeout)
    if store is None:
        store, _, _ = next(dist.rendezvous("env://", world.rank, world.size, timeout=timeout))
    is_static = is_agents and os.environ.get(NOT_SHARED) == "1"
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1" and not is_static:
        return store
    return dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _store_at_home(world: World, timeout: timedelta) -> dist.Store | None:
    """Return the store that rank 0 serves where all are told to meet at a loopback address, and only there; else None.

    Left to itself torch's store listens on all addresses of the host, whatever MASTER_ADDR says (2.13).
    """
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not port.isdecimal() or not _is_loopback(host):
        return None
    try:
        listener = socket.create_server((host, int(port)), backlog=world.size + 16)
    except (OSError, OverflowError):  # in use: perhaps by a store of this process, which torch then uses again
        return None
    return dist.TCPStore(
        host,
        int(port),
        world.size,
        is_master=True,
        timeout=timeout,
        multi_tenant=True,
        master_listen_fd=listener.detach(),
    )


def _is_loopback(host: str) -> bool:
    """Return whether a host is a loopback address of version 4, by number or by the name that means it everywhere."""
    try:
        return host == "localhost" or ipaddress.IPv4Address(host).is_loopback
    except ValueError:
        return False
