"""Join folders of shards: the parts that several nodes made, or folders that were prepared each by itself.

    python launcher/data.py merge input=shards output=shards

An input that holds parts/ stands for its parts, which become what one node would have made of all of it. Files are
linked where they can be, else copied; what was joined may be removed afterwards. Started again after a kill, it
makes the same folder.
"""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import BeforeValidator, Field, PositiveInt

from dsv3_megatron.data.prepare.merge import merge
from dsv3_megatron.data.raw.inputs import printable
from launcher.command_line.arguments import Arguments, ReadableBy, takes
from launcher.command_line.typed import command
from launcher.data_commands.lengths import AHEAD, FIM_RATE, FimRate, Lengths, ahead_of
from launcher.data_commands.words import path_list, source_lines, tell, warnings
from parallel.errors import one_line
from parallel.units import parse_bytes


class MergeArguments(Arguments):
    """What the command takes."""

    input: str = Field(description="folders that launcher/prepare_data.py wrote, separated by commas")
    output: str = Field(description="folder for the joined shards")
    deduplicate_memory: Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)] = Field(
        1 << 30, description="memory for finding copies among parts, such as 4GiB; the rest lies on disk"
    )
    sequence_length: Lengths | None = Field(None, description=AHEAD)
    fim_rate: FimRate = Field(0.0, description=FIM_RATE)
    workers: PositiveInt = Field(os.cpu_count() or 1, description="processes that write shards without copies")
    readable_by: ReadableBy = "owner"


@takes(MergeArguments, __doc__)
def main(given: MergeArguments) -> int:
    """Join the folders; return the exit code."""
    ahead = ahead_of(given.sequence_length, given.fim_rate)
    manifest = merge(
        path_list(given.input), given.output, memory=given.deduplicate_memory, workers=given.workers, ahead=ahead,
        tell=tell,
    )  # fmt: skip
    print("\n".join(source_lines(manifest.sources)))
    for line in (*manifest.bad_examples, *warnings(manifest.sources, float(str(manifest.options["held_out"])))):
        tell(f"    {line}")
    for packed in ahead.results(given.output):
        print(one_line(packed))
    print(
        one_line(f"train on it: {command('train')} recipe=dsv3_tiny data=indexed data.path={printable(given.output)}")
    )
    return 0
