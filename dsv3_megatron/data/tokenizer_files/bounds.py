"""What a tokenizer.json may hold: no more than published ones do, many times over.

The library takes what it is given: a replacement that turns each letter into a million, an expression that matches for
hours, more added tokens than it can search for. Whoever loads a tokenizer encodes texts with it, so it is refused here.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from math import prod
from typing import Any

from dsv3_megatron.data.tokenizer_files.patterns import slow_part

MOST_TOKENS = 1 << 22  # the largest vocabularies that are published have a quarter of a million
_ADDED = 1 << 16
_CHARACTERS = 1 << 12  # of an added token
_PIECES_CHARACTERS = 1 << 23  # of all pieces of a Unigram model, which is a tree with a node for each
_AFFIX = 64  # characters before or behind each word, or in place of some
_STEPS = 64  # of normalizer, pre-tokenizer or decoder
_GROWTH = 256  # times as many characters as a text has
_LEVELS = 24


def check_bounds(content: dict[str, Any]) -> None:
    """Raise ValueError where a tokenizer.json holds what would exhaust who encodes with it."""
    model = content["model"]
    _check_count("tokens", model.get("vocab"), MOST_TOKENS)
    _check_count("merges", model.get("merges"), 2 * MOST_TOKENS)
    _check_count("added tokens", content.get("added_tokens"), _ADDED)
    for token in content.get("added_tokens") or ():
        if isinstance(token, dict) and isinstance(name := token.get("content"), str) and len(name) > _CHARACTERS:
            raise ValueError(f"an added token has {len(name):,} characters")
    if isinstance(pieces := model.get("vocab"), list):
        length = sum(len(piece[0]) for piece in pieces if isinstance(piece, list) and piece and type(piece[0]) is str)
        if length > _PIECES_CHARACTERS:
            raise ValueError(f"its pieces have {length:,} characters")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
        if isinstance(text := model.get(key), str) and len(text) > _AFFIX:
            raise ValueError(f"model.{key} has {len(text):,} characters")
    if (prefix := model.get("continuing_subword_prefix")) and not _continue(prefix, model.get("merges")):
        raise ValueError("it has merges whose second part lacks model.continuing_subword_prefix")
    grown = 1
    for section in ("normalizer", "pre_tokenizer"):
        grown *= _growth(section, content.get(section))
    for section, growth in (
        ("normalizer and pre_tokenizer", grown),
        ("decoder", _growth("decoder", content.get("decoder"))),
    ):
        if growth > _GROWTH:
            raise ValueError(f"its {section} can make a text {growth:,} times as long")


def _continue(prefix: object, merges: object) -> bool:
    """Return whether every merge's second part begins with the prefix, which the library cuts off unseen: where it
    cuts a character in two, it ends the process."""
    if not isinstance(prefix, str) or not isinstance(merges, list | None):
        return False
    for merge in merges or ():
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not str(parts[1]).startswith(prefix):
            return False
    return True


def _check_count(what: str, found: object, most: int) -> None:
    if isinstance(found, list | dict) and len(found) > most:
        raise ValueError(f"it has {len(found):,} {what}, {most:,} at most are read")


def _growth(section: str, content: object) -> int:
    """Return how many times as long a text can become by the steps of a section."""
    steps = list(_steps(section, content, _LEVELS))
    if len(steps) > _STEPS:
        raise ValueError(f"its {section} has {len(steps):,} steps")
    return prod(_growth_of(section, step) for step in steps)


def _steps(section: str, content: object, levels: int) -> Iterator[dict[str, Any]]:
    """Yield the steps of a section, those inside others too."""
    if not levels:
        raise ValueError(f"its {section} is nested too deeply")
    if isinstance(content, dict):
        yield content
        for value in content.values():
            yield from _steps(section, value, levels - 1)
    elif isinstance(content, list):
        for value in content:
            yield from _steps(section, value, levels - 1)


def _growth_of(section: str, step: dict[str, Any]) -> int:
    """Return how many times as long one step can make a text. Raises: ValueError: nobody can say."""
    if isinstance(pattern := step.get("Regex"), str) and (reason := slow_part(pattern)):
        raise ValueError(f"its {section} splits or replaces by {pattern[:60]!r}, which can take for ever: {reason}")
    if step.get("String") == "":
        raise ValueError(f"its {section} splits or replaces by nothing")
    for key in ("content", "prepend", "replacement"):
        if isinstance(text := step.get(key), str) and len(text) > _AFFIX:
            raise ValueError(f"its {section} puts in {len(text):,} characters for some")
    kind = step.get("type")
    if kind == "Replace" and isinstance(text := step.get("content"), str):
        return max(1, len(text))
    if kind == "ByteLevel":
        return 2
    if isinstance(charsmap := step.get("precompiled_charsmap"), str):
        return _longest_of(charsmap)
    return 1


def _longest_of(charsmap: str) -> int:
    """Return the bytes of the longest string that SentencePiece's map puts in for a character."""
    data = base64.b64decode(charsmap, validate=True)
    first = 4 + int.from_bytes(data[:4], "little")
    return max(map(len, data[first:].split(b"\0")), default=1) or 1
