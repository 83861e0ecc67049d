"""Token shards made ready by all ranks of a run: each looks at its share of the files and packs its share of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from dsv3_megatron.data.source.shard_folder import ShardFolder
from parallel.agree import agreed, from_first

TOLD_SECONDS = 10.0  # between two lines
_LINE_BYTES = 1024  # of a line about a packing that is made again


def ready_together(folder: ShardFolder, tell: Callable[[str], None]) -> Path:
    """Return the place of packings that are ready. All ranks together; no rank looks at more than its share of files.

    Raises: DataError: a file is missing or cut, or the packings cannot be kept where all ranks find them.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    place = from_first(folder.choose_place)
    made_again: list[str] = []
    with agreed(any_counts=True):  # a file that is cut is met by the rank whose share it is in
        folder.make_ready(place, (rank, ranks), _Progress(tell if rank == 0 else lambda _: None), made_again.append)
    for line in _of_all(made_again):
        tell(line)
    with agreed(looked=rank == 0):
        if rank == 0:
            folder.seal(place, tell)
    return place


def _of_all(lines: list[str]) -> list[str]:
    """Return on rank 0 the first line that any rank has to tell, and how many more there are; elsewhere nothing.

    Where no rank has a line, this takes one all-reduce of a number.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    count, first = torch.tensor(len(lines)), torch.tensor(rank if lines else ranks)
    if ranks > 1:
        dist.all_reduce(count)
    if not count:
        return []
    text = torch.zeros(_LINE_BYTES, dtype=torch.uint8)  # bytes, for objects would be pickled
    if ranks > 1:
        dist.all_reduce(first, op=dist.ReduceOp.MIN)
    if rank == int(first):
        said = lines[0].encode()[:_LINE_BYTES]
        text[: len(said)] = torch.frombuffer(bytearray(said), dtype=torch.uint8)
    if ranks > 1:
        dist.broadcast(text, src=int(first))
    if rank:
        return []
    told = bytes(text.tolist()).rstrip(b"\0").decode("utf-8", "replace")
    return [told, f"and {int(count) - 1:,} more"] if int(count) > 1 else [told]


class _Progress:
    """Tells now and then how far the first rank's share is: the others' are as large."""

    def __init__(self, tell: Callable[[str], None]):
        self._tell, self._told = tell, time.monotonic()

    def __call__(self, done: int, of: int) -> None:
        if of and time.monotonic() - self._told >= TOLD_SECONDS:
            self._told = time.monotonic()
            self._tell(f"packing documents into sequences: {done:,} of {of:,} files of this rank's share")
