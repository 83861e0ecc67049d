"""Rows of zeros after every expert's tokens."""

from __future__ import annotations

from torch import Tensor


def pad(input: Tensor, output: Tensor, rows: list[int], padded: list[int]) -> None:
    """Copy ``rows`` consecutive rows each to places of ``padded`` rows, the rest of which are zeros."""
    at = to = 0
    for count, room in zip(rows, padded):
        output[to : to + count] = input[at : at + count]
        output[to + count : to + room] = 0
        at, to = at + count, to + room


def unpad(input: Tensor, output: Tensor, padded: list[int], rows: list[int]) -> None:
    """Take the rows of zeros away again."""
    at = to = 0
    for room, count in zip(padded, rows):
        output[to : to + count] = input[at : at + count]
        at, to = at + room, to + count
