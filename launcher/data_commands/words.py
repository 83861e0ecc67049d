"""What the commands over data have in common: lists of paths as people type them, and what became of each input."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from dsv3_megatron.data.source.shards import Source
from parallel.errors import RecipeError, one_line
from parallel.units import show_bytes

_QUOTES = "'\""


def tell(line: str) -> None:
    """Tell a person what is no result."""
    print(one_line(line), file=sys.stderr)


def path_list(text: str, key: str = "input") -> tuple[str, ...]:
    """Return the paths of ``A,B``, ``[A,B]`` or ``'A','B'``.

    A comma that is part of a name is written ``\\,``, or the name in quotes; a text that is an existing path as it
    stands is that path. Raises: RecipeError: it names no path, or a quote is not closed.
    """
    if os.path.exists(text):
        return (text,)
    inner = text.strip()
    if inner.startswith("[") and inner.endswith("]"):
        inner = inner[1:-1]
    found: list[str] = []
    word, quote, at = "", "", 0
    while at < len(inner):
        letter = inner[at]
        if letter == "\\" and inner[at + 1 : at + 2] in (",", "\\", "'", '"', "[", "]"):
            word, at = word + inner[at + 1], at + 1
        elif quote:
            word, quote = (word, "") if letter == quote else (word + letter, quote)
        elif letter in _QUOTES and not word.strip():
            word, quote = "", letter
        elif letter == ",":
            found, word = [*found, word.strip()], ""
        else:
            word += letter
        at += 1
    if quote:
        raise RecipeError(
            f"{key} = {text} opens a quote and does not close it; write \\{quote} where it is part of a name"
        )
    paths = tuple(path for path in (*found, word.strip()) if path)
    if not paths:
        raise RecipeError(
            f"{key} = {text} names no path; write {key}=FILE or {key}=FOLDER, several with commas between"
        )
    return paths


def part_of(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts) <= 65_535):
        raise RecipeError(f"part = {text} is no part; write its number from 1 and how many there are: 3/16")
    return int(part), int(parts)


def source_lines(sources: Sequence[Source]) -> list[str]:
    """Return what became of each source, in a line or two."""
    lines = []
    for source in sources:
        splits = {split: totals.tokens for split, totals in source.shards.items()}
        shards = sum(totals.shards for totals in source.shards.values())
        made = f"{splits['train']:,} training and {splits['held_out']:,} held-out tokens in {_counted(shards, 'shard')}"
        read = f"{_counted(source.documents, 'document')} of {_counted(source.files, 'file')}"
        lines.append(
            f"{one_line(source.name)}: {read}, {show_bytes(source.text_bytes)} -> "
            f"{made if shards else f'{source.tokens:,} tokens'}"
        )
        if left_out := _left_out(source):
            lines.append(f"    left out: {', '.join(left_out)}")
    return lines


def warnings(sources: Sequence[Source], held_out: float) -> list[str]:
    """Return what a person should know of finished sources before training on them."""
    lines = [f"{source.name}: its input gave no document" for source in sources if not source.documents]
    alone = [s for s in sources if s.documents and not s.shards["held_out"].documents]
    if held_out and alone:
        names = ", ".join(source.name for source in alone)
        lines.append(f"{names}: nothing is held out, for there is one document (or copies of one) only")
    if not any(source.shards["held_out"].documents for source in sources):
        lines.append("no document was held out, and training needs some: raise held_out, or add documents")
    return lines


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _left_out(source: Source) -> list[str]:
    found = []
    if source.duplicates:
        found.append(f"{source.duplicates:,} the same as another")
    if source.empty:
        found.append(f"{source.empty:,} empty")
    if source.bad:
        found.append(f"{source.bad:,} not readable ({show_bytes(source.bad_bytes)})")
    if source.torn:
        places = _counted(source.torn, "damaged place")
        found.append(f"{show_bytes(source.torn_bytes)} on disk in {places}")
    if source.ignored_files:
        found.append(f"{_counted(source.ignored_files, 'file')} of unknown kind")
    if source.skipped:
        found.append(f"{source.skipped:,} skipped (links, pipes, hidden files)")
    return found
