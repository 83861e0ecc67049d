"""What torchrun told this process about itself. No torch import: mistakes are told before anything long starts."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from parallel.errors import LayoutError

NOT_SHARED = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"  # environment variable, of torch: an agent keeps its store to itself
AGENTS_STORE = "TORCHELASTIC_USE_AGENT_STORE"  # environment variable, of torch: whether ranks use the agent's store
LOOPBACK = ("lo", "lo0")
# What launchers that make no ranks tell the processes that they start: how many there are. SLURM's is of a step, which
# srun starts; the shell of a job knows SLURM_NTASKS alone. Open MPI's; that of MPICH and Intel MPI.
TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def host_name() -> str:
    """Return this host's name as SLURM calls it, where SLURM has started us: what its commands take; else its own.

    Several nodes that SLURM plays on one machine have one host name, and names of their own there.
    Raises LayoutError: it is no name that a folder can have.
    """
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        raise LayoutError(f"SLURMD_NODENAME = {name!r} is no name of a host; unset it")
    return name


@dataclass(frozen=True)
class World:
    """Rank, size and rank on this machine."""

    rank: int
    size: int
    local_rank: int

    @classmethod
    def from_environment(cls) -> World:
        """Return rank 0 of 1 where no launcher set anything.

        Raises LayoutError: the variables make no sense, or there are several processes and none is told its rank.
        """
        _check_tasks()
        try:
            world = cls(*(int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))))
        except ValueError as error:
            raise LayoutError(
                f"RANK, WORLD_SIZE or LOCAL_RANK is not a number ({error}); start with torchrun"
            ) from None
        if not 0 <= world.rank < world.size:
            raise LayoutError(f"RANK = {world.rank} is not in WORLD_SIZE = {world.size}; start with torchrun")
        return world

    @property
    def is_at_home(self) -> bool:
        """Whether torchrun has started all ranks on this host."""
        return os.environ.get("LOCAL_WORLD_SIZE") == str(self.size)

    @property
    def is_open(self) -> bool:
        """Whether torchrun's agent serves its store to other hosts too, although all ranks are on this one."""
        others = any(name not in LOOPBACK for _, name in socket.if_nameindex())
        return self.is_at_home and others and os.environ.get(AGENTS_STORE) == "True"


def _check_tasks() -> None:
    for name in TASKS if "WORLD_SIZE" not in os.environ else ():
        if (tasks := os.environ.get(name, "")).isdecimal() and int(tasks) > 1:
            raise LayoutError(
                f"{name} = {tasks}, but WORLD_SIZE is not set: each of these processes would train alone, as rank 0 of "
                "1; start ranks with torchrun or dsv3 submit (docs/slurm.md), or runs of their own with WORLD_SIZE=1"
            )
