"""Pack the documents of token shards into sequences before a run does it at its start.

    python launcher/data.py pack data=shards sequence_length=32768 fim_rate=0.1

A run packs what is missing on all its ranks. Here it is done on one node (part=3/16: on one of several), without GPUs
that wait. What is packed lies beside the shards, and is taken by every run of this length and rate.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveInt

from dsv3_megatron.data.settings import DataSettings
from dsv3_megatron.data.source.open_files import OpenFiles
from dsv3_megatron.data.source.packing_files import OpenPacking
from dsv3_megatron.data.source.shard_folder import ShardFolder
from launcher.command_line.arguments import Arguments, takes
from launcher.data_commands.words import part_of
from parallel.errors import DataError


class PackArguments(Arguments):
    """What the command takes."""

    data: str = Field(description="folder of token shards that launcher/prepare_data.py wrote")
    sequence_length: PositiveInt = Field(4096, description="tokens of one sequence, as data.sequence_length")
    fim_rate: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="as data.fim_rate")
    cache: str = Field(".cache/dsv3", description="where packings go if the folder cannot be written, as data.cache")
    part: str | None = Field(
        None, description="make one share of several, 3/16, on several nodes; the last of them to end says so"
    )
    workers: PositiveInt = Field(os.cpu_count() or 1, description="processes that pack")


@takes(PackArguments, __doc__)
def main(given: PackArguments) -> int:
    """Pack; return the exit code."""
    settings = DataSettings(
        source="indexed", path=given.data, cache=given.cache, sequence_length=given.sequence_length,
        fim_rate=given.fim_rate,
    )  # fmt: skip
    folder = ShardFolder.of(settings)
    place = folder.choose_place()
    number, parts = part_of(given.part) or (1, 1)
    shares = [((number - 1) * given.workers + worker, parts * given.workers) for worker in range(given.workers)]
    if given.workers > 1:
        with ProcessPoolExecutor(given.workers, get_context("spawn")) as pool:
            list(pool.map(_pack, [settings] * len(shares), [str(place)] * len(shares), shares))
    else:
        _pack(settings, str(place), shares[0])
    try:
        folder.seal(place)
    except DataError:
        if parts == 1:
            raise
        print(f"part {number} of {parts} is packed in {place}; the others are not all there yet")
        return 0
    files = OpenFiles()
    sequences = sum(int(OpenPacking(packing, files).sequences[-1]) for packing in folder.packings(place))
    print(f"{sequences:,} sequences of {given.sequence_length:,} tokens in {place}")
    return 0


def _pack(settings: DataSettings, place: str, share: tuple[int, int]) -> None:
    folder = ShardFolder.of(settings)
    folder.make_ready(Path(place), share)
