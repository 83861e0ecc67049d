"""Pack the documents of token shards into sequences before a run does it at its start.

    python launcher/data.py pack data=shards sequence_length=4096,32768 fim_rate=0.1

A run packs what is missing on all its ranks. Here it is done on one node (part=3/16: on one of several), without GPUs
that wait; launcher/prepare_data.py and launcher/data.py merge do the same when they end, given a sequence_length. What
is packed lies beside the shards, and is taken by every run of this length and rate.
"""

from __future__ import annotations

import os

from pydantic import Field, PositiveInt

from dsv3_megatron.data.prepare.pack import CACHE, pack_share, packed
from dsv3_megatron.data.source.shard_folder import ShardFolder
from launcher.command_line.arguments import Arguments, ReadableBy, takes
from launcher.data_commands.lengths import FIM_RATE, LENGTH, FimRate, Lengths, ahead_of
from launcher.data_commands.words import part_of
from parallel.errors import DataError, one_line


class PackArguments(Arguments):
    """What the command takes."""

    data: str = Field(description="folder of token shards that launcher/prepare_data.py wrote")
    sequence_length: Lengths = Field((4096,), description=LENGTH)
    fim_rate: FimRate = Field(0.0, description=FIM_RATE)
    cache: str = Field(CACHE, description="where packings go if the folder cannot be written, as data.cache")
    part: str | None = Field(
        None, description="make one share of several, 3/16, on several nodes; the last of them to end says so"
    )
    workers: PositiveInt = Field(os.cpu_count() or 1, description="processes that pack")
    readable_by: ReadableBy = "owner"


@takes(PackArguments, __doc__)
def main(given: PackArguments) -> int:
    """Pack; return the exit code."""
    number, parts = part_of(given.part) or (1, 1)
    for settings in ahead_of(given.sequence_length, given.fim_rate).settings(given.data, given.cache):
        folder = ShardFolder.of(settings)
        place = folder.choose_place()
        pack_share(settings, place, (number, parts), given.workers)
        try:
            print(one_line(packed(folder, place)))
        except DataError:
            if parts == 1:
                raise
            print(one_line(f"part {number} of {parts} is packed in {place}; the others are not all there yet"))
    return 0
