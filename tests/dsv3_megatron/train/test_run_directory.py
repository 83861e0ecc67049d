"""Every host sees the run directory that rank 0 made, can write there, and nobody else trains in it."""

import errno
import json
import os
import socket

import torch
import torch.distributed as dist

from dsv3_megatron.run.directory import RunDirectory
from dsv3_megatron.run.lock import run_lock
from dsv3_megatron.train.run_directory import create_for_all_hosts, held_by_rank_0
from parallel.groups import start_processes
from parallel.world import World
from testing.ranks import run_ranks

HOST = socket.gethostname()


def created(case):
    """Return what this rank raises, and what lies in its directory afterwards."""
    place, hosts, fault = case
    rank = int(os.environ["RANK"])
    start_processes(World.from_environment(), torch.device("cpu"), timeout_seconds=60)
    os.environ["LOCAL_RANK"] = str(rank) if hosts == 1 else "0"
    directory = RunDirectory(f"{place}/run")
    if rank and fault == "no mount":
        directory = RunDirectory(f"{place}/unmounted")
    if rank and fault == "read-only":
        directory._try_to_write = refuse_to_write
    try:
        create_for_all_hosts(directory)
    except Exception as error:
        return type(error).__name__, str(error)
    dist.barrier()  # rank 0 has tidied up
    return sorted(path.name for path in directory.path.iterdir())


def refuse_to_write():
    raise OSError(errno.EROFS, "Read-only file system")


def test_the_directory_is_made_once_and_every_host_looks(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "unmounted" / "checkpoints").mkdir(parents=True)
    cases = [(str(tmp_path), 1, None), (str(tmp_path), 3, None), (str(tmp_path / "file"), 3, None),
             (str(tmp_path), 3, "no mount"), (str(tmp_path), 3, "read-only")]  # fmt: skip
    alone, together, nowhere, unmounted, read_only = run_ranks(3, created, cases)
    assert alone == together == [["checkpoints"]] * 3
    line = f"recipe: run.directory = {tmp_path / 'file' / 'run'} cannot be written (Not a directory); name another"
    assert nowhere == [("RecipeError", f"{line} directory")] * 3
    who, few = f"fault: rank 1 on {HOST} (and 1 more there): recipe: run.directory =", "(2 of 3 ranks: no fault of the"
    for kind, text in unmounted:
        assert kind == "RankFault" and text.startswith(f"{who} {tmp_path}/unmounted is not the folder that rank 0")
        assert few in text
    for kind, text in read_only:
        assert kind == "RankFault" and text.startswith(
            f"{who} {tmp_path}/run cannot be written (Read-only file system)"
        )
        assert few in text


def held(place):
    """Return what this rank raises, and whether the lock was there in the block."""
    start_processes(World.from_environment(), torch.device("cpu"), timeout_seconds=60)
    try:
        with held_by_rank_0(place, print):
            owner = json.loads((RunDirectory(place).path / "lock").read_text())["process"]
            dist.barrier()  # all have read it
    except Exception as error:
        return type(error).__name__, str(error)
    return owner, os.getpid()


def test_a_directory_in_use_ends_all_ranks_with_one_line(tmp_path):
    (first, second) = run_ranks(2, held, [str(tmp_path / "new")])[0]
    assert first[0] == second[0] == first[1] != second[1]
    assert not (tmp_path / "new" / "lock").exists()
    with run_lock(tmp_path):
        (mine, theirs) = run_ranks(2, held, [str(tmp_path)])[0]
    assert mine == theirs and mine[0] == "RunInUseError" and f"is in use by process {os.getpid()}" in mine[1]
