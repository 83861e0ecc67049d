"""What any rank finds damaged while the data is made ready is told once, by the first rank."""

from pathlib import Path

import torch

from dsv3_megatron.train.data.ready import ready_together
from parallel.groups import start_processes
from parallel.world import World
from testing.ranks import run_ranks


class Folder:
    def __init__(self, lines):
        self._lines = lines

    def choose_place(self):
        return Path("place")

    def make_ready(self, place, share, progress, tell):
        for number in range(self._lines[share[0]]):
            tell(f"rank {share[0]}, file {number}")

    def seal(self, place, tell):
        tell("sealed")


def told(lines):
    start_processes(World.from_environment(), torch.device("cpu"), timeout_seconds=60)
    found = []
    ready_together(Folder(lines), found.append)
    return found


def test_lines_of_other_ranks_are_told_by_the_first():
    nothing, one, many = run_ranks(2, told, [(0, 0), (0, 1), (1, 20)])
    assert nothing == [["sealed"], []]
    assert one == [["rank 1, file 0", "sealed"], []]
    assert many[0] == ["rank 0, file 0", "and 20 more", "sealed"]
    assert many[1] == []
