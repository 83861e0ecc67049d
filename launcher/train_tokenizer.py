"""Train a byte-level BPE tokenizer in DeepSeek's manner on raw documents.

    python launcher/train_tokenizer.py input=code,web.jsonl.zst output=tokenizer.json vocab_size=32768

Takes the same inputs as launcher/prepare_data.py. Special tokens and the split of text into words, marks joined with
line breaks and digits in threes are those of DeepSeek-V3's published tokenizer; any text survives a round trip.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, PositiveInt

from dsv3_megatron.data.prepare.plan import text_bytes
from dsv3_megatron.data.raw.documents import Lost, Span, SpanReader
from dsv3_megatron.data.raw.inputs import check_distinct, files_of, printable
from dsv3_megatron.data.tokenizer import Tokenizer
from dsv3_megatron.data.tokenizer_files.names import CONFIG
from dsv3_megatron.data.tokenizer_files.read import TOKENIZER
from dsv3_megatron.run.written import WrittenFiles
from launcher.command_line.arguments import Arguments, ReadableBy, takes
from launcher.command_line.console import ProgressLine, guarded
from launcher.data_commands.words import path_list, tell
from parallel.errors import DataError
from parallel.units import parse_count

_RUN_CHARACTERS = 1 << 20  # that are learned from, or left out, at a stretch


class TokenizerArguments(Arguments):
    """What the command takes."""

    input: str = Field(description="files and folders, separated by commas")
    output: str = Field(description="the tokenizer.json to write")
    vocab_size: Annotated[PositiveInt, BeforeValidator(parse_count)] = Field(
        128_000, description="tokens at most, special ones included"
    )
    field: str = Field("text", description="the field of a row that holds its document")
    sample: Annotated[PositiveInt, BeforeValidator(parse_count)] = Field(
        1_000_000_000, description="characters to learn from, spread evenly over the inputs"
    )
    readable_by: ReadableBy = "owner"


@takes(TokenizerArguments, __doc__)
def main(given: TokenizerArguments) -> int:
    """Train the tokenizer; return the exit code."""
    files, names = written_files(Path(given.output))
    inputs = path_list(given.input)
    found = _Found()
    tokenizer = Tokenizer.train(_sample(inputs, given.field, given.sample, found), given.vocab_size, "vocab_size")
    if not found.documents:
        told = f": {found.first}" if found.first else ""
        raise DataError(f"input = {printable(given.input)} holds no readable document{told}; check the input and field")
    try:
        files.begin(names)
        tokenizer.save(given.output)
        files.end(names)
    except OSError as error:
        raise DataError(
            f"output = {printable(given.output)} cannot be written ({error.strerror}); name another file"
        ) from None
    learned = f"{found.documents:,} documents, {found.characters:,} characters"
    left_out = f"; {found.lost:,} not readable" if found.lost else ""
    print(f"{printable(given.output)}: {tokenizer.vocab_size:,} tokens learned from {learned}{left_out}")
    if found.first:
        tell(f"    such as {found.first}")
    return 0


def written_files(output: Path) -> tuple[WrittenFiles, list[str]]:
    """Return the files that are written, as this command knows them again, and their names.

    Raises: DataError: one is there that it has not written; a tokenizer cannot be made again from the data that it was
    used for.
    """
    names = [output.name, *([CONFIG] if output.name == TOKENIZER else [])]
    files = WrittenFiles(output.parent, f".{output.name}.trained")
    if other := files.other(names):
        raise DataError(
            f"output = {printable(str(output))}: {output.with_name(other)} is there, and this command has not written "
            "it; name another file, or remove it"
        )
    return files, names


@dataclass
class _Found:
    documents: int = 0
    characters: int = 0
    lost: int = 0  # rows and places that could not be read
    first: str = ""  # of them


def _sample(inputs: tuple[str, ...], field: str, limit: int, found: _Found) -> Iterator[str]:
    """Yield documents of all inputs, runs of them evenly spread, until ``limit`` characters."""

    each = [files_of(name) for name in inputs]
    check_distinct(inputs, each)
    files = [file for one in each for file in one.files]
    total = sum(file.size for file in files)
    stride = max(1, sum(map(text_bytes, files)) // limit)
    line, done, characters = ProgressLine("reading"), 0, 0
    for file in files:
        reader = SpanReader(Span(file), field)
        for row in reader:
            line.update(done + reader.disk, total, f"{found.documents:,} documents")
            if isinstance(row, Lost):
                found.lost += max(row.rows, 1)
                found.first = found.first or str(row)
                continue
            run, characters = characters // _RUN_CHARACTERS, characters + len(row.text)
            if run % stride == 0 and row.text:
                found.documents += 1
                found.characters += len(row.text)
                yield row.text
            if found.characters >= limit:
                return line.close()
        done += file.size
    line.close()


if __name__ == "__main__":
    sys.exit(guarded(main))
