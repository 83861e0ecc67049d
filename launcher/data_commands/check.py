"""Compare every byte of token shards with the checksums that were written with them.

    python launcher/data.py check data=shards

Reads each file of the shards once and compares its SHA-256 with the table of shards. Shards that an earlier version
prepared get the checksums of blocks that a run compares whenever it reads (.sums). On several nodes each checks a
part=3/16.
"""

from __future__ import annotations

import os

from pydantic import Field, PositiveInt

from dsv3_megatron.data.checked.whole import check_folder
from launcher.command_line.arguments import Arguments, takes
from launcher.data_commands.words import part_of
from parallel.errors import one_line
from parallel.units import show_bytes


class CheckArguments(Arguments):
    """What the command takes."""

    data: str = Field(description="folder of token shards that launcher/prepare_data.py wrote")
    part: str | None = Field(None, description="check one share of several, 3/16, on several nodes")
    workers: PositiveInt = Field(os.cpu_count() or 1, description="processes that read")


@takes(CheckArguments, __doc__)
def main(given: CheckArguments) -> int:
    """Check; return the exit code."""
    found = check_folder(given.data, given.workers, part_of(given.part) or (1, 1))
    print(one_line(f"{given.data}: {found.shards:,} shards of {show_bytes(found.bytes)} are as they were written"))
    if found.added:
        print(f"checksums of blocks were written for {found.added:,} of them")
    if found.lacking:
        print(f"{found.lacking:,} shards of other parts have none yet")
    return 0
