"""What a linear layer keeps of its input for the weight gradient, in place of the input itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class SavedOperand(Protocol):
    """Something that gives X [T, I] back, float32, when the weight gradient is due."""

    def dequantise(self) -> Tensor:
        """Return X, float32."""


def attach_saved(x: Tensor, saved: SavedOperand) -> Tensor:
    """Mark x as something another module keeps for backward already; return x.

    The linear layer that takes x as its input then keeps ``saved``, not a copy of its own: a SwiGLU's cached input
    from which x is computed again, the attention output's cache. The mark goes with the Python object: an operation
    in between drops it, and the layer keeps its own copy.
    """
    x.saved = saved
    return x


def saved_of(x: Tensor) -> SavedOperand | None:
    """Return what was attached for x."""
    return getattr(x, "saved", None)


def columns(x: Tensor, ends: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return x [T, I] with every expert's first row at the start of a 128-row tile, and where each row went.

    Rows of zeros fill the last tile of each expert, which changes no tile's amax. Without ``ends`` [E] x is as it is.
    """
    if ends is None:
        return x, None
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    tiles = (ends - starts + 127) // 128
    first_tile = tiles.cumsum(0) - tiles
    row = torch.arange(x.shape[0], device=x.device, dtype=ends.dtype)
    expert = torch.searchsorted(ends, row, right=True)
    rows = (row - starts[expert] + 128 * first_tile[expert]).long()
    return x.new_zeros((max(int(tiles.sum()), 1) * 128, x.shape[1])).index_copy_(0, rows, x), rows


class Columns:
    """X or dY in FP8 with tiles along tokens. An expert's tiles begin at its own first token."""

    def __init__(self, x: Tensor, ends: Tensor | None, quantise_columns: Callable):
        padded, self._rows = columns(x, ends)
        self.quantised = quantise_columns(padded)

    def dequantise(self) -> Tensor:
        """Return float32 [T, I]."""
        whole = self.quantised.dequantise()
        return whole if self._rows is None else whole.index_select(0, self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes it occupies."""
        return self.quantised.nbytes + (self._rows.nbytes if self._rows is not None else 0)
