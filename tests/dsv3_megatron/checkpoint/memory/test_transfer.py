"""A share that travels is compared at both ends: what is damaged on the way, or before, is no copy, and no rank hangs.

Two real ranks send to each other; neither has a model.
"""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import dsv3_megatron.checkpoint.memory.transfer as transfer
from dsv3_megatron.checkpoint.memory.share import read, write
from dsv3_megatron.checkpoint.write import Staging
from dsv3_megatron.pipeline.saved import Entry
from parallel.groups import start_processes, stop_processes
from parallel.world import World
from testing.ranks import run_ranks

PROGRESS = {"step": 3, "tokens": 5, "samples": 7, "skipped": 0}
FACTS = {"layout": {}, "extra": [], "optimizer": True, "updates": 3}
CASES = (
    "whole",
    "nothing",
    "damaged before",
    "shortened",
    "gone",
    "damaged on the way",
    "no room",
    "refused by the disk",
)


def exchange_here(case):
    """Send this rank's share to the other and receive its; return what came of it, and what lies there then."""
    name, place = case
    rank = int(os.environ["RANK"])
    start_processes(World.from_environment(), torch.device("cpu"), timeout_seconds=60)
    numbers = torch.arange(5000 + 300 * rank, dtype=torch.float32)
    entry = Entry("x", tuple(numbers.shape), (0,), numbers)
    files = Staging().files_of({"weights": [entry], "optimizer": [entry]}, rank, copy=True)
    memory = {"run": "r", "life": "0" * 8, "rank": rank, "world": 2, "cut": "c"}
    own = Path(place) / name / f"own{rank}"
    give = write(own, files, "recipe: x\n", PROGRESS, FACTS, memory)
    kept = transfer._BLOCK, transfer.free_bytes, transfer.new_file, transfer._Receiving.take
    transfer._BLOCK = 4096
    path = own / f"__{rank}_1.distcp"
    if rank == 1:  # all damage is done to what rank 1 sends; what rank 0 sends arrives in every case
        if name == "nothing":
            give = None
        elif name == "damaged before":
            data = bytearray(path.read_bytes())
            data[777] ^= 4
            path.write_bytes(data)
        elif name == "shortened":
            os.truncate(path, 9000)
        elif name == "gone":
            path.unlink()
    elif name == "damaged on the way":  # after rank 1 has taken its checksum
        take = transfer._Receiving.take
        transfer._Receiving.take = lambda self, block: take(self, block ^ 1)
    elif name == "no room":
        transfer.free_bytes = lambda folder: 1000
    elif name == "refused by the disk":
        transfer.new_file = lambda path: open("/dev/full", "wb", buffering=0)  # noqa: SIM115  as new_file does
    try:
        to = Path(place) / name / f"kept{rank}"
        done = transfer.exchange(dist.group.WORLD, give, 1 - rank, to, 1 - rank)
        there = (to / "manifest.json").exists() and read(to).damage() is None
        return done.received is not None, there, done.failure, done.sent_bytes
    finally:
        transfer._BLOCK, transfer.free_bytes, transfer.new_file, transfer._Receiving.take = kept
        stop_processes()


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory):
    place = str(tmp_path_factory.mktemp("transfer"))
    return dict(zip(CASES, run_ranks(2, exchange_here, [(case, place) for case in CASES], timeout_seconds=60)))


def test_a_whole_share_arrives_as_it_was_sent(exchanged):
    for received, there, failure, sent in exchanged["whole"]:
        assert received and there and failure is None and sent > 2 * 20_000


@pytest.mark.parametrize("case", CASES[1:])
def test_a_share_that_is_not_whole_is_no_copy(exchanged, case):
    mine, other = exchanged[case]
    assert not mine[0] and not mine[1] and other[3] == 0, "rank 0 must have no copy, and rank 1 must know"
    assert other[0] and other[1] and mine[3] > 0, "what rank 0 sends arrives all the same"
    says = {
        "nothing": (None, None),
        "damaged before": ("has not come as it was written", "cannot be sent (is not what was written)"),
        "shortened": ("has not come as it was written", "cannot be sent (is too short)"),
        "gone": ("has not come as it was written", "cannot be sent (No such file or directory)"),
        "damaged on the way": ("has not come as it was written", None),
        "no room": ("do not fit into 1000 B", None),
        "refused by the disk": ("No space left on device", None),
    }[case]
    for said, expected in zip((mine[2], other[2]), says):
        assert (said is None) == (expected is None) and (expected or "") in (said or ""), said
