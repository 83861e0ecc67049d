"""Turn raw documents into token shards that data=indexed trains on.

    python launcher/prepare_data.py input=code,web.jsonl.zst weights=0.3,0.7 output=shards tokenizer=tokenizer.json

Inputs are files or folders: JSON lines (.jsonl), Parquet, plain text, source code; .gz and .zst unpacked on the way.
A plain file is one document; a row's document is its `field`. Started again after a kill, it goes on where it stood.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt

from dsv3_megatron.data.prepare.shard import PrepareOptions, prepare
from launcher.command_line.arguments import Arguments, takes
from launcher.command_line.console import ProgressLine, guarded
from launcher.command_line.typed import command
from parallel.errors import RecipeError
from parallel.units import parse_count, show_bytes, show_count


class PrepareArguments(Arguments):
    """What the command takes."""

    input: str = Field(description="files and folders, separated by commas")
    output: str = Field(description="folder for the shards")
    tokenizer: str = Field(
        description="a tokenizer.json (launcher/train_tokenizer.py makes one), or a published model's folder"
    )
    weights: str | None = Field(None, description="share of samples of each input; default: by their tokens")
    field: str = Field("text", description="the field of a row that holds its document")
    held_out: Annotated[float, Field(ge=0, lt=1)] = Field(0.005, description="share of documents never trained on")
    deduplicate: bool = Field(False, description="keep the first of documents that are the same to the byte")
    split_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1, description="share of the tokens joining marks and line breaks that are spelled in two"
    )
    seed: NonNegativeInt = Field(1234, description="of the tokens that are split")
    shard_tokens: Annotated[PositiveInt, BeforeValidator(parse_count)] = Field(
        64_000_000, description="tokens of a shard, about; what a kill can cost"
    )
    max_bad: NonNegativeInt = Field(1000, description="stop when more documents than this cannot be read")
    workers: PositiveInt = Field(os.cpu_count() or 1, description="processes that read and encode")


@takes(PrepareArguments, __doc__)
def main(given: PrepareArguments) -> int:
    """Prepare the data; return the exit code."""

    inputs = _list(given.input)
    try:
        weights = tuple(float(w) for w in _list(given.weights)) if given.weights else None
    except ValueError:
        raise RecipeError(f"weights = {given.weights} are not numbers; write one for each input: 0.3,0.7") from None
    if weights is not None and (len(weights) != len(inputs) or min(weights) <= 0):
        raise RecipeError(f"weights = {given.weights}: give {len(inputs)} numbers above 0, one for each input")
    common = set(PrepareOptions.__dataclass_fields__) - {"inputs", "weights"}
    options = PrepareOptions(inputs=inputs, weights=weights, **given.model_dump(include=common))
    line = ProgressLine("encoding")

    def progress(done: int, total: int, tokens: int) -> None:
        line.update(done, total, f"{show_count(tokens)} tokens")

    manifest = prepare(options, workers=given.workers, progress=progress, tell=_tell)
    line.close()
    _report(manifest, given.output)
    return 0


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


def _report(manifest: Any, output: str) -> None:
    """Print what became of each input."""
    for source in manifest.sources:
        splits = {split: totals.tokens for split, totals in source.shards.items()}
        print(
            f"{source.name}: {source.documents:,} documents of {source.files:,} files, {show_bytes(source.text_bytes)} "
            f"-> {splits['train']:,} training and {splits['held_out']:,} held-out tokens in "
            f"{sum(totals.shards for totals in source.shards.values())} shards"
        )
        notes = {
            "the same as another": source.duplicates,
            "empty": source.empty,
            "not readable": source.bad,
            "files of unknown kind": source.ignored_files,
        }
        if any(notes.values()):
            print("    left out: " + ", ".join(f"{count:,} {what}" for what, count in notes.items() if count))
    if not any(source.shards["held_out"].shards for source in manifest.sources):
        print("    no document was held out, and training needs some: raise held_out", file=sys.stderr)
    for example in manifest.bad_examples:
        print(f"    {example}", file=sys.stderr)
    print(f"train on it: {command('train')} recipe=dsv3_tiny data=indexed data.path={output}")


if __name__ == "__main__":
    sys.exit(guarded(main))
