"""Train a byte-level BPE tokenizer in DeepSeek's manner on raw documents.

    python launcher/train_tokenizer.py input=code,web.jsonl.zst output=tokenizer.json vocab_size=32768

Takes the same inputs as launcher/prepare_data.py. Special tokens and the split of text into words, marks joined with
line breaks and digits in threes are those of DeepSeek-V3's published tokenizer; any text survives a round trip.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated

from pydantic import BeforeValidator, Field, PositiveInt

from dsv3_megatron.data.prepare.documents import BLOCK_BYTES, blocks, files_of, texts
from dsv3_megatron.data.tokenizer import Tokenizer
from launcher.command_line.arguments import Arguments, takes
from launcher.command_line.console import ProgressLine, guarded
from parallel.errors import DataError
from parallel.units import parse_count


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


@takes(TokenizerArguments, __doc__)
def main(given: TokenizerArguments) -> int:
    """Train the tokenizer; return the exit code."""

    inputs = [part.strip() for part in given.input.split(",") if part.strip()]
    found = {"documents": 0, "characters": 0, "bad": 0}
    tokenizer = Tokenizer.train(_sample(inputs, given.field, given.sample, found), given.vocab_size, "vocab_size")
    if not found["documents"]:
        raise DataError(f"input = {given.input} holds no readable document; check field = {given.field}")
    try:
        tokenizer.save(given.output)
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"output = {given.output} cannot be written ({error}); name another file") from None
    learned, bad = f"{found['documents']:,} documents, {found['characters']:,} characters", found["bad"]
    print(f"{given.output}: {tokenizer.vocab_size:,} tokens learned from {learned}" + (f"; {bad:,} bad" if bad else ""))
    return 0


def _sample(inputs: list[str], field: str, limit: int, found: dict[str, int]) -> Iterator[str]:
    """Yield documents of all inputs, whole blocks of them evenly spread, until ``limit`` characters."""

    files = [path for name in inputs for path in files_of(name)[0]]
    total = sum(path.stat().st_size for path in files)
    stride = max(1, total // limit)
    line, done = ProgressLine("reading"), 0
    for number, block in enumerate(blocks(files)):
        done += block.size
        line.update(done, total, f"{found['documents']:,} documents")
        if number % stride and total > BLOCK_BYTES:
            continue
        documents, bad = texts(block, field)
        found["bad"] += len(bad)
        for text in documents:
            if found["characters"] >= limit:
                break
            found["documents"] += 1
            found["characters"] += len(text)
            yield text
    line.close()


if __name__ == "__main__":
    sys.exit(guarded(main))
