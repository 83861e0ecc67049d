"""The three products of a linear layer, Y = X W^T, in high precision or in emulated FP8.

| product | left operand, tile | right operand, tile | sums over |
|---|---|---|---|
| fprop Y | X, 1x128 | W, 128x128 | input channels |
| dgrad dX | dY, 1x128 | W, the same numbers | output channels |
| wgrad dW | dY, 128x1 | X, 128x1 | tokens |

The operands are exactly FP8 numbers times their scales; the product itself is float32, rounded once to the output's
dtype (dW stays float32 and is added to float32 gradients, in high precision too). Layers hold one of these objects and
never ask which.

Legend: T tokens (for experts sorted by expert, ``ends`` [E] the last row of each, exclusive), I and O input and output
width, E local experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dsv3_megatron.precision.accumulation import matmul
from dsv3_megatron.precision.delayed import AmaxHistory
from dsv3_megatron.precision.formats import E4M3, E5M2, Format
from dsv3_megatron.precision.grouped import grouped_product
from dsv3_megatron.precision.saved import Columns, SavedOperand
from dsv3_megatron.precision.settings import Fp8Settings
from dsv3_megatron.precision.tiles import Quantised, Tile, quantise
from dsv3_megatron.precision.weight_gradients import add_grouped_product, add_product

_TILES: dict[str, Tile] = {"1x128": (1, 128), "128x128": (128, 128), "tensor": (0, 0)}
_ALONG_TOKENS: dict[str, Tile] = {"1x128": (128, 1), "128x128": (128, 128), "tensor": (0, 0)}


class Products(Protocol):
    """How a layer multiplies."""

    def forward(
        self, x: Tensor, weight: Tensor, ends: Tensor | None, kept: SavedOperand | None = None, *, training: bool = True
    ) -> tuple[Tensor, Any]:
        """Return Y [..., O] from X [..., I] and W [(E,) O, I], and what the weight gradient needs of X.

        ``kept``: what another module keeps of X anyway (precision/saved.py); None where nothing is. ``training``: else
        nothing that later products depend on may change.
        """

    def input_gradient(self, grad: Tensor, weight: Tensor, ends: Tensor | None) -> tuple[Tensor, Any]:
        """Return dX [..., I] from dY [..., O], and what the weight gradient needs of dY."""

    def operand_for_weight_gradient(self, x: Any, ends: Tensor | None) -> Any:
        """Return what the weight gradient needs of X from the backward on, in place of what ``forward`` kept."""

    def add_weight_gradient(
        self, total: Tensor, dy: Any, x: Any, ends: Tensor | None, rows: Sequence[int] | None
    ) -> None:
        """Add dW to ``total`` [(E,) O, I], float32, from what ``input_gradient`` and ``operand_for_weight_gradient``
        gave.

        ``rows``: of each expert, as the host knows them; None where ``ends`` is.
        """


class HighPrecision:
    """Products in the dtype of the operands."""

    def forward(
        self, x: Tensor, weight: Tensor, ends: Tensor | None, kept: SavedOperand | None = None, *, training: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return Y and X itself."""
        if ends is None:
            return torch.matmul(x, weight.t()), x
        return grouped_product(x, weight.transpose(1, 2), ends), x

    def input_gradient(self, grad: Tensor, weight: Tensor, ends: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return dX, and dY itself."""
        return (grad.matmul(weight) if ends is None else grouped_product(grad, weight, ends)), grad

    def operand_for_weight_gradient(self, x: Tensor, ends: Tensor | None) -> Tensor:
        """Return X itself."""
        return x

    def add_weight_gradient(
        self, total: Tensor, dy: Tensor, x: Tensor, ends: Tensor | None, rows: Sequence[int] | None
    ) -> None:
        """Add dW to ``total``."""
        _add_wgrad(total, dy.flatten(0, -2), x.flatten(0, -2), ends, rows)


HIGH_PRECISION = HighPrecision()


class Fp8Products:
    """Products of FP8 operands, emulated on any device. One object per layer: it keeps the layer's quantised weight."""

    name = "emulated"
    step = 0  # counts optimizer steps, over all layers: a weight is quantised once a step
    input_comes_again = False  # X's memory is given back after the forward, and filled by recomputation in backward

    def __init__(self, settings: Fp8Settings):
        self.settings = settings
        self._gradient_format = E5M2 if settings.format == "hybrid" else E4M3
        self._training = True  # a history of amaxes is one of training: an evaluation adds nothing to it
        self._weight: tuple[int, int, Quantised] | None = None  # (step, version, in FP8)
        self._plain: Tensor | None = None  # what of that weight survives, once a product has asked for it
        length = settings.delayed_history if settings.scaling == "delayed" else 0
        self._histories = {role: AmaxHistory(length) for role in ("input", "weight", "gradient")} if length else {}

    def forward(
        self, x: Tensor, weight: Tensor, ends: Tensor | None, kept: SavedOperand | None = None, *, training: bool = True
    ) -> tuple[Tensor, SavedOperand | Tensor]:
        """Return Y, and X in FP8 as the weight gradient will use it: one byte an element is kept, not X.

        X itself is kept where it comes again, which takes no memory until then.
        """
        self._training = training
        rows = x.flatten(0, -2)
        along_channels = self._quantise_rows(rows)
        y = self.fprop(along_channels, weight, ends)
        saved: SavedOperand | Tensor
        if kept is not None:
            saved = kept
        elif self.input_comes_again and not self._histories:  # a second look at X would count its amax twice
            saved = x
        else:
            saved = self._for_weight_gradient(rows, along_channels, ends)
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1]), saved

    def operand_for_weight_gradient(self, x: SavedOperand | Tensor, ends: Tensor | None) -> SavedOperand:
        """Return X in FP8: X itself, where forward kept that, is a byte an element again."""
        if not isinstance(x, Tensor):
            return x
        rows = x.flatten(0, -2)
        return self._for_weight_gradient(rows, self._quantise_rows(rows), ends)

    def input_gradient(self, grad: Tensor, weight: Tensor, ends: Tensor | None) -> tuple[Tensor, SavedOperand]:
        """Return dX, and dY in FP8 as the weight gradient will use it."""
        rows, tile = grad.flatten(0, -2), self.settings.gradient_tile
        dy = self._quantise(rows, _TILES[tile], self._gradient_format, "gradient")
        dx = self.dgrad(dy, weight, ends).to(grad.dtype)
        # One scale for the whole tensor: along channels and along tokens these are the same numbers.
        kept = dy if tile == "tensor" else Columns(rows, ends, self._quantise_gradient_columns)
        return dx.view(*grad.shape[:-1], dx.shape[-1]), kept

    def add_weight_gradient(
        self, total: Tensor, dy: SavedOperand, x: SavedOperand, ends: Tensor | None, rows: Sequence[int] | None
    ) -> None:
        """Add dW to ``total``."""
        whole_tensor = isinstance(x, Quantised) and self.settings.activation_tile == "tensor"
        if not isinstance(x, Columns) and not whole_tensor:
            x = Columns(x.dequantise().flatten(0, -2), ends, self._quantise_columns)
        self.wgrad(total, dy, x, ends, rows)

    # -- the products themselves: what a backend with FP8 units replaces ----------------------------------------------

    def fprop(self, x: Quantised, weight: Tensor, ends: Tensor | None) -> Tensor:
        """Return Y [T, O]."""
        return self._multiply(x.dequantise(self._product_dtype(weight)), self._plain_weight(weight).mT, ends)

    def dgrad(self, dy: Quantised, weight: Tensor, ends: Tensor | None) -> Tensor:
        """Return dX [T, I]."""
        return self._multiply(dy.dequantise(self._product_dtype(weight)), self._plain_weight(weight), ends)

    def _product_dtype(self, weight: Tensor) -> torch.dtype:
        """Return the dtype in which dequantised operands multiply, to a result in the same dtype."""
        return torch.bfloat16 if weight.dtype is torch.bfloat16 and self._exact_in_bf16(weight) else torch.float32

    def _exact_in_bf16(self, operand: Tensor) -> bool:
        """Return whether the operand's device multiplies dequantised numbers as exactly in BF16. A GPU's BF16 units add
        up in float32, and BF16 holds an FP8 number times a power of two exactly: the same products, many times faster.
        """
        exact = self.settings.power_of_two_scales and self.settings.accumulation == "fp32"
        return exact and operand.device.type == "cuda"

    def wgrad(
        self, total: Tensor, dy: SavedOperand, x: SavedOperand, ends: Tensor | None, rows: Sequence[int] | None
    ) -> None:
        """Add dW to ``total`` [(E,) O, I], float32."""
        left, right = dy.dequantise(), x.dequantise()
        if self.settings.accumulation == "fp32":
            dtype = torch.bfloat16 if self._exact_in_bf16(total) else torch.float32
            _add_wgrad(total, left.to(dtype), right.to(dtype), ends, rows)
        elif rows is None:
            total.add_(matmul(left.t(), right, self.settings.accumulation))
        else:
            for one, a, b in zip(total, left.split(list(rows)), right.split(list(rows))):
                one.add_(matmul(a.t(), b, self.settings.accumulation))

    def _multiply(self, left: Tensor, right: Tensor, ends: Tensor | None) -> Tensor:
        """Return left [T, K] times right [(E,) K, N]."""
        if ends is None:
            return matmul(left, right, self.settings.accumulation)
        if self.settings.accumulation == "fp32":
            return grouped_product(left, right, ends)
        parts = [matmul(a, w, self.settings.accumulation) for (a,), w in zip(_by_expert(ends, left), right)]
        return torch.cat(parts)

    # -- operands ------------------------------------------------------------------------------------------------------

    def _quantise_rows(self, rows: Tensor) -> Quantised:
        return self._quantise(rows, _TILES[self.settings.activation_tile], E4M3, "input")

    def _for_weight_gradient(self, rows: Tensor, along_channels: Quantised, ends: Tensor | None) -> SavedOperand:
        if self.settings.wgrad_operands == "retiled" or self.settings.activation_tile == "tensor":
            return along_channels  # the paper: the copy that forward used is cut anew in backward
        return Columns(rows, ends, self._quantise_columns)

    def quantised_weight(self, weight: Tensor) -> Quantised:
        """Return the weight in FP8. Made once a step."""
        key = (Fp8Products.step, weight._version)
        if self._weight is None or self._weight[:2] != key:
            found = self._quantise(weight.detach(), _TILES[self.settings.weight_tile], E4M3, "weight")
            self._weight, self._plain = (*key, found), None
        return self._weight[2]

    def _plain_weight(self, weight: Tensor) -> Tensor:
        """Return what of the weight survives FP8, in the dtype of the products. Made once a step, where it is used."""
        quantised = self.quantised_weight(weight)
        if self._plain is None:
            self._plain = quantised.dequantise(self._product_dtype(weight))
        return self._plain

    def _quantise(self, x: Tensor, tile: Tile, fmt: Format, role: str) -> Quantised:
        amax = self._histories[role].amax_for(x, note=self._training) if self._histories else None
        return quantise(x, tile, fmt, power_of_two=self.settings.power_of_two_scales, amax=amax)

    def _quantise_columns(self, x: Tensor) -> Quantised:
        # Re-tiling adds no error of its own only with power-of-two scales (arXiv 2412.19437 section 3.3.3).
        power_of_two = self.settings.power_of_two_scales or self.settings.wgrad_operands == "retiled"
        return quantise(x, _ALONG_TOKENS[self.settings.activation_tile], E4M3, power_of_two=power_of_two)

    def _quantise_gradient_columns(self, grad: Tensor) -> Quantised:
        tile = _ALONG_TOKENS[self.settings.gradient_tile]
        return quantise(grad, tile, self._gradient_format, power_of_two=self.settings.power_of_two_scales)


def _add_wgrad(total: Tensor, dy: Tensor, x: Tensor, ends: Tensor | None, rows: Sequence[int] | None) -> None:
    if rows is None:
        add_product(total, dy.t(), x)
    else:
        add_grouped_product(total, dy, x, rows, ends)


def _by_expert(ends: Tensor, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Return every tensor's rows of each expert."""
    lengths = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return list(zip(*(tensor.split(lengths) for tensor in tensors)))
