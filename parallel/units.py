"""Quantities as people write them in recipes: ``10T`` tokens, ``80GiB``, ``2000 steps``."""

from __future__ import annotations

import math
import re

DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
BINARY = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
GIB = BINARY["GiB"]
MOST = 10**18  # of what is counted, bytes too: a million times the largest runs, and exact in every sum
_LONGEST = 40  # characters
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE][+]?[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_count(text: object) -> int:
    """Return a count such as ``469B`` or ``14.8T`` as an integer. Raises ValueError when it is none."""
    if isinstance(text, bool):
        raise ValueError(f"{text} is not a count; write a number with an optional K, M, B or T, such as 469B")
    if isinstance(text, (int, float)):
        if not 0 <= text < math.inf or text != int(text):
            raise ValueError(f"{str(text)[:_LONGEST]} is not a whole number of zero or more")
        return _at_most(int(text))
    match = _QUANTITY.fullmatch(str(text)) if len(str(text)) <= _LONGEST else None
    if not match or match[2] not in DECIMAL:
        shown = repr(str(text)[:_LONGEST])
        raise ValueError(f"{shown} is not a count; write a number with an optional K, M, B or T, such as 469B")
    return _at_most(float(match[1]) * DECIMAL[match[2]])


def parse_bytes(text: object) -> int:
    """Return a size such as ``80GiB`` in bytes. Raises ValueError when it is none."""
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        if not 0 <= text < math.inf:
            shown = str(text)[:_LONGEST]
            raise ValueError(f"{shown} is not a size; write a number with KiB, MiB, GiB or TiB, such as 80GiB")
        return _at_most(int(text))
    match = _QUANTITY.fullmatch(str(text)) if len(str(text)) <= _LONGEST else None
    if not match or match[2] not in BINARY:
        shown = repr(str(text)[:_LONGEST])
        raise ValueError(f"{shown} is not a size; write a number with KiB, MiB, GiB or TiB, such as 80GiB")
    return _at_most(float(match[1]) * BINARY[match[2]])


def _at_most(number: int | float) -> int:
    if number > MOST:
        raise ValueError(f"it is more than {MOST:,}, which is more than anybody counts; write a smaller number")
    return round(number)


def show_count(count: int | float) -> str:
    """Return a count in the shortest of the units above: ``12.6B``."""
    for suffix, scale in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if abs(count) >= scale:
            return f"{count / scale:.4g}{suffix}"
    return f"{count:.4g}"


def show_bytes(size: int | float) -> str:
    """Return a size in the binary unit that reads best: ``71.3 GiB``."""
    for suffix in ("TiB", "GiB", "MiB", "KiB"):
        if abs(size) >= BINARY[suffix]:
            return f"{size / BINARY[suffix]:.1f} {suffix}"
    return f"{size:.0f} B"


def show_duration(seconds: float) -> str:
    """Return a duration as people say it: ``3m 20s``, ``2d 4h``."""
    whole = round(seconds)
    for (big, big_size), (small, small_size) in (
        (("d", 86400), ("h", 3600)),
        (("h", 3600), ("m", 60)),
        (("m", 60), ("s", 1)),
    ):
        if whole >= big_size:
            return f"{whole // big_size}{big} {whole % big_size // small_size}{small}"
    return f"{seconds:.1f}s"
