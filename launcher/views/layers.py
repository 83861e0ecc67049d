"""Rows of a table about parameters, those of layers that agree on one line."""

from __future__ import annotations

import re
from collections.abc import Iterable

_LAYER = re.compile(r"layers\.(\d+)\.")


def without_number(name: str) -> str:
    """Return a parameter's name with * for the number of its layer."""
    return _LAYER.sub("layers.*.", name, count=1)


def shape_of(sizes: Iterable[int]) -> str:
    """Return a shape as text: ``128 x 64``."""
    return " x ".join(map(str, sizes))


def collapsed(rows: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return (name with * for the layer, layers, the rest) of rows (name, the rest): one for all layers that agree."""
    merged: dict[tuple[str, ...], list[int]] = {}
    for name, *rest in rows:
        number = _LAYER.search(name)
        merged.setdefault((without_number(name), *rest), []).extend([int(number[1])] if number else [])
    return [(name, _ranges(layers), *rest) for (name, *rest), layers in merged.items()]


def _ranges(layers: list[int]) -> str:
    """Return layers as text: ``0-2,5``."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(f"{a}-{b}" if a < b else str(a) for a, b in runs)
