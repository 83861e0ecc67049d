"""The three products of a linear layer, Y = X W^T, in high precision or in emulated FP8.

| product | left operand, tile | right operand, tile | sums over |
|---|---|---|---|
| fprop Y | X, 1x128 | W, 128x128 | input channels |
| dgrad dX | dY, 1x128 | W, the same numbers | output channels |
| wgrad dW | dY, 128x1 | X, 128x1 | tokens |

The operands are exactly FP8 numbers times their scales; the product itself is float32, rounded once to the output's
dtype (dW stays float32, as it is added to float32 gradients). Layers hold one of these objects and never ask which.

Legend: T tokens (for experts sorted by expert, ``ends`` [E] the last row of each, exclusive), I and O input and output
width, E local experts.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dsv3_megatron.precision.accumulation import matmul
from dsv3_megatron.precision.grouped import grouped_product, grouped_weight_gradient
from dsv3_megatron.precision.settings import Fp8Settings
from dsv3_megatron.precision.tiles import E4M3, E5M2, Format, Quantised, Tile, quantise, quantise_dequantise

_TILES: dict[str, Tile] = {"1x128": (1, 128), "128x128": (128, 128), "tensor": (0, 0)}
_ALONG_TOKENS: dict[str, Tile] = {"1x128": (128, 1), "128x128": (128, 128), "tensor": (0, 0)}


class Products(Protocol):
    """How a layer multiplies."""

    def forward(self, x: Tensor, weight: Tensor, ends: Tensor | None) -> tuple[Tensor, object]:
        """Return Y [..., O] from X [..., I] and W [(E,) O, I], and what the weight gradient needs of X."""

    def input_gradient(self, grad: Tensor, weight: Tensor, ends: Tensor | None) -> Tensor:
        """Return dX [..., I] from dY [..., O]."""

    def weight_gradient(self, grad: Tensor, saved: object, ends: Tensor | None) -> Tensor:
        """Return dW [(E,) O, I] from dY [..., O]."""


class HighPrecision:
    """Products in the dtype of the operands."""

    def forward(self, x: Tensor, weight: Tensor, ends: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return Y and X itself."""
        if ends is None:
            return torch.matmul(x, weight.t()), x
        return grouped_product(x, weight.transpose(1, 2), ends), x

    def input_gradient(self, grad: Tensor, weight: Tensor, ends: Tensor | None) -> Tensor:
        """Return dX."""
        return grad.matmul(weight) if ends is None else grouped_product(grad, weight, ends)

    def weight_gradient(self, grad: Tensor, saved: Tensor, ends: Tensor | None) -> Tensor:
        """Return dW."""
        if ends is None:
            return grad.flatten(0, -2).t().mm(saved.flatten(0, -2))
        return grouped_weight_gradient(saved, grad, ends)


HIGH_PRECISION = HighPrecision()


class EmulatedFp8:
    """Products of FP8 operands, emulated on any device. One object per layer: it keeps the layer's quantised weight."""

    step = 0  # counts optimizer steps, over all layers: a weight is quantised once a step

    def __init__(self, settings: Fp8Settings):
        self.settings = settings
        self._gradient_format = E5M2 if settings.format == "hybrid" else E4M3
        self._weight: tuple[int, int, Tensor] | None = None  # (step, version, dequantised)

    def forward(self, x: Tensor, weight: Tensor, ends: Tensor | None) -> tuple[Tensor, Quantised]:
        """Return Y, and X in FP8 as the weight gradient will use it: one byte an element is kept, not X."""
        tile = self.settings.activation_tile
        rows = x.flatten(0, -2)
        along_channels = self._quantise(rows, _TILES[tile], E4M3)
        w = self._quantised_weight(weight)
        left = along_channels.dequantise()
        y = matmul(left, w.t(), self.settings.accumulation) if ends is None else self._grouped(left, w.mT, ends)
        if self.settings.wgrad_operands == "retiled" or tile == "tensor":
            saved = along_channels  # the paper: the copy that forward used is cut anew in backward
        else:
            saved = _Columns.of(rows, ends, self._quantise_columns)
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1]), saved

    def input_gradient(self, grad: Tensor, weight: Tensor, ends: Tensor | None) -> Tensor:
        """Return dX."""
        rows = grad.flatten(0, -2)
        left = self._quantise(rows, _TILES[self.settings.gradient_tile], self._gradient_format).dequantise()
        w = self._quantised_weight(weight)
        dx = matmul(left, w, self.settings.accumulation) if ends is None else self._grouped(left, w, ends)
        return dx.to(grad.dtype).view(*grad.shape[:-1], dx.shape[-1])

    def weight_gradient(self, grad: Tensor, saved: Quantised | _Columns, ends: Tensor | None) -> Tensor:
        """Return dW, float32."""
        x = saved.dequantise()
        if isinstance(saved, Quantised) and saved.tile[0] == 1 and self.settings.activation_tile == "1x128":
            x = _Columns.of(x, ends, self._quantise_columns).dequantise()
        rows = grad.flatten(0, -2)
        dy = _Columns.of(rows, ends, self._quantise_gradient_columns).dequantise()
        if ends is None:
            return matmul(dy.t(), x, self.settings.accumulation)
        return grouped_weight_gradient(x, dy, ends)

    # -- operands ------------------------------------------------------------------------------------------------------

    def _quantise(self, x: Tensor, tile: Tile, fmt: Format) -> Quantised:
        return quantise(x, tile, fmt, power_of_two=self.settings.power_of_two_scales)

    def _quantise_columns(self, x: Tensor) -> Quantised:
        # Re-tiling adds no error of its own only with power-of-two scales (arXiv 2412.19437 section 3.3.3).
        power_of_two = self.settings.power_of_two_scales or self.settings.wgrad_operands == "retiled"
        return quantise(x, _ALONG_TOKENS[self.settings.activation_tile], E4M3, power_of_two=power_of_two)

    def _quantise_gradient_columns(self, grad: Tensor) -> Quantised:
        return self._quantise(grad, _ALONG_TOKENS[self.settings.gradient_tile], self._gradient_format)

    def _quantised_weight(self, weight: Tensor) -> Tensor:
        """Return what of the weight survives FP8, float32."""
        key = (EmulatedFp8.step, weight._version)
        if self._weight is None or self._weight[:2] != key:
            tile = _TILES[self.settings.weight_tile]
            survived = quantise_dequantise(weight.detach(), tile, E4M3, power_of_two=self.settings.power_of_two_scales)
            self._weight = (*key, survived)
        return self._weight[2]

    def _grouped(self, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return grouped_product(x, weight, ends)


class _Columns:
    """X or dY in FP8 with tiles along tokens. An expert's tiles begin at its own first token."""

    def __init__(self, quantised: Quantised, rows: Tensor | None):
        self._quantised, self._rows = quantised, rows

    @classmethod
    def of(cls, x: Tensor, ends: Tensor | None, quantise_columns: object) -> _Columns:
        """Return x [T, I] quantised; between experts rows of zeros fill the last tile of each, which changes none."""
        if ends is None:
            return cls(quantise_columns(x), None)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        tiles = (ends - starts + 127) // 128
        first_tile = tiles.cumsum(0) - tiles
        row = torch.arange(x.shape[0], device=x.device, dtype=ends.dtype)
        expert = torch.searchsorted(ends, row, right=True)
        rows = (row - starts[expert] + 128 * first_tile[expert]).long()
        padded = x.new_zeros((max(int(tiles.sum()), 1) * 128, x.shape[1])).index_copy_(0, rows, x)
        return cls(quantise_columns(padded), rows)

    def dequantise(self) -> Tensor:
        """Return float32 [T, I]."""
        whole = self._quantised.dequantise()
        return whole if self._rows is None else whole.index_select(0, self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes it occupies."""
        return self._quantised.nbytes + (self._rows.nbytes if self._rows is not None else 0)
