"""Turn raw documents into token shards that data=indexed trains on.

    python launcher/prepare_data.py input=code,web.jsonl.zst weights=0.3,0.7 output=shards tokenizer=tokenizer.json

Inputs are files or folders: rows of JSON (.jsonl, .json), Parquet, plain text, source code; .gz, .zst, .bz2 and .xz are
unpacked on the way. A plain file is one document; a row's document is its `field`. Started again after a kill, it goes
on where it stood. On several nodes each makes a part=3/16, and launcher/data.py merge joins them. With
sequence_length=4096 the documents are packed too, and a run of that length starts at once.
"""

from __future__ import annotations

import math
import os
import sys
from typing import Annotated

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt

from dsv3_megatron.data.mixture.phases import MixtureCurve
from dsv3_megatron.data.prepare.output import Part
from dsv3_megatron.data.prepare.shard import PrepareOptions, prepare
from dsv3_megatron.data.raw.inputs import printable
from dsv3_megatron.data.raw.lines import DOCUMENT_BYTES
from launcher.command_line.arguments import Arguments, ReadableBy, takes
from launcher.command_line.console import ProgressLine, guarded
from launcher.command_line.typed import as_typed, command
from launcher.data_commands.lengths import AHEAD, FIM_RATE, FimRate, Lengths, ahead_of
from launcher.data_commands.words import part_of, path_list, source_lines, tell, warnings
from parallel.errors import RecipeError, one_line
from parallel.units import parse_bytes, parse_count, show_count


class PrepareArguments(Arguments):
    """What the command takes."""

    input: str = Field(description="files and folders, separated by commas; a comma in a name is written \\,")
    output: str = Field(description="folder for the shards")
    tokenizer: str = Field(
        description="a tokenizer.json (launcher/train_tokenizer.py makes one), or a published model's folder"
    )
    weights: str | None = Field(None, description="share of samples of each input; default: by their tokens")
    field: str = Field("text", description="the field of a row that holds its document")
    held_out: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.005, description="share of documents never trained on; at least one of each input, unless 0"
    )
    deduplicate: bool = Field(False, description="keep the first of documents that are the same to the byte")
    deduplicate_memory: Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)] = Field(
        1 << 30, description="memory for finding them, such as 4GiB; the rest lies on disk"
    )
    split_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1, description="share of the tokens joining marks and line breaks that are spelled in two"
    )
    seed: NonNegativeInt = Field(1234, description="of the tokens that are split")
    shard_tokens: Annotated[PositiveInt, BeforeValidator(parse_count)] = Field(
        64_000_000, description="tokens of a shard at most, about; what a kill can cost each worker"
    )
    sequence_length: Lengths | None = Field(None, description=AHEAD)
    fim_rate: FimRate = Field(0.0, description=FIM_RATE)
    part: str | None = Field(None, description="make one part of several, 3/16, into OUTPUT/parts; merge joins them")
    max_bad: NonNegativeInt = Field(1000, description="stop when more documents than this cannot be read")
    max_torn: Annotated[int, BeforeValidator(parse_bytes), Field(ge=0)] = Field(
        64 << 20, description="stop when more bytes than this of damaged files cannot be read, such as 64MiB"
    )
    document_bytes: Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)] = Field(
        DOCUMENT_BYTES, description="largest row or text that is read, unpacked; a larger one counts as not readable"
    )
    workers: PositiveInt = Field(os.cpu_count() or 1, description="processes that read, encode and write")
    readable_by: ReadableBy = "owner"


@takes(PrepareArguments, __doc__)
def main(given: PrepareArguments) -> int:
    """Prepare the data; return the exit code."""

    inputs = path_list(given.input)
    try:
        weights = tuple(float(w) for w in given.weights.strip("[]").split(",")) if given.weights else None
    except ValueError:
        raise RecipeError(f"weights = {given.weights} are not numbers; write one for each input: 0.3,0.7") from None
    if weights is not None:
        if len(weights) != len(inputs) or not all(0 < weight < math.inf for weight in weights):
            raise RecipeError(f"weights = {given.weights}: give {len(inputs)} numbers above 0, one for each input")
        MixtureCurve.constant(dict(zip(map(printable, inputs), weights)), key="weights")  # as training will
    common = set(PrepareOptions.__dataclass_fields__) - {"inputs", "weights", "part"}
    options = PrepareOptions(
        inputs=inputs, weights=weights, part=part_of(given.part), **given.model_dump(include=common)
    )  # fmt: skip
    ahead = ahead_of(given.sequence_length, given.fim_rate)
    line = ProgressLine("encoding")

    def progress(done: int, total: int, tokens: int) -> None:
        line.update(done, total, f"{show_count(tokens)} tokens")

    def tell_beside(said: str) -> None:
        line.close()
        tell(said)

    made = prepare(options, workers=given.workers, ahead=ahead, progress=progress, tell=tell_beside)
    line.close()
    print("\n".join(source_lines(made.counted if isinstance(made, Part) else made.sources)))
    for example in made.bad_examples:
        tell(f"    {example}")
    output = printable(given.output)
    if isinstance(made, Part):
        print(one_line(f"part {made.part} of {made.parts} is in {printable(options.folder)}; when all are made: "
                       f"{as_typed('python launcher/data.py')} merge input={output} output={output}"))  # fmt: skip
        return 0
    for warning in warnings(made.sources, given.held_out):
        tell(f"    {warning}")
    for packed in ahead.results(given.output):
        print(one_line(packed))
    print(one_line(f"train on it: {command('train')} recipe=dsv3_tiny data=indexed data.path={output}"))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
