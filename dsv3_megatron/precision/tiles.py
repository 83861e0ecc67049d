"""Tile-wise quantisation to FP8: the one implementation of the project, bit for bit what Transformer Engine computes.

A tensor [..., A, B] is cut into tiles of a x b elements; a tile has one scale, from its own largest element now. Edge
tiles are partial. Rules (arXiv 2412.19437 section 3.3; Transformer Engine 2.x, block scaling):

1. amax = largest magnitude in the tile, NaN skipped; 0 or inf: scale 1.
2. scale = F / amax, F the format's largest number; overflown: the largest finite value of the input's dtype.
3. power-of-two scales: the mantissa of the scale is cleared.
4. data = cast(x * scale), to nearest even, saturating; scale_inv = 1 / scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Tile = tuple[int, int]


@dataclass(frozen=True)
class Format:
    """An FP8 element format."""

    name: str
    dtype: torch.dtype
    largest: float
    mantissa_bits: int
    exponent_bias: int


E4M3 = Format("e4m3", torch.float8_e4m3fn, 448.0, 3, 7)
E5M2 = Format("e5m2", torch.float8_e5m2, 57344.0, 2, 15)


@dataclass(frozen=True)
class Quantised:
    """A tensor in FP8: ``data`` [..., A, B] and ``scale_inv`` float32 [..., ceil(A / a), ceil(B / b)]."""

    data: Tensor
    scale_inv: Tensor
    tile: Tile
    format: Format

    def dequantise(self) -> Tensor:
        """Return data * scale_inv, float32 [..., A, B]."""
        return _scaled(decode(self.data, self.format), self.scale_inv, self.tile)

    @property
    def nbytes(self) -> int:
        """Bytes it occupies."""
        return self.data.nbytes + self.scale_inv.nbytes


def quantise(x: Tensor, tile: Tile, fmt: Format = E4M3, *, power_of_two: bool = True) -> Quantised:
    """Return x [..., A, B] in FP8 with a scale per tile.

    Args:
        x: any floating dtype.
        tile: (a, b) elements; (0, 0) = the whole matrix is one tile.
    """
    tile = whole_tile(x, tile)
    scale = tile_scales(tile_amax(x, tile), fmt, x.dtype, power_of_two=power_of_two)
    scaled = _scaled(x.float(), scale, tile)
    return Quantised(encode(scaled, fmt), 1.0 / scale, tile, fmt)


def quantise_dequantise(x: Tensor, tile: Tile, fmt: Format = E4M3, *, power_of_two: bool = True) -> Tensor:
    """Return what of x [..., A, B] survives FP8, float32."""
    return quantise(x, tile, fmt, power_of_two=power_of_two).dequantise()


def whole_tile(x: Tensor, tile: Tile) -> Tile:
    """Return the tile, with (0, 0) standing for the whole matrix."""
    return tile if tile != (0, 0) else (max(x.shape[-2], 1), max(x.shape[-1], 1))


def tile_amax(x: Tensor, tile: Tile) -> Tensor:
    """Return the largest magnitude in each tile, float32 [..., ceil(A / a), ceil(B / b)]; NaN does not count."""
    magnitude = x.abs()
    if magnitude.isnan().any():
        magnitude = magnitude.nan_to_num(0.0, posinf=float("inf"))
    return _cut(magnitude, tile).amax(dim=(-3, -1)).float()


def tile_scales(amax: Tensor, fmt: Format, dtype: torch.dtype, *, power_of_two: bool) -> Tensor:
    """Return the scale of each tile from its largest magnitude; ``dtype`` is that of the tensor."""
    usable = (amax > 0) & amax.isfinite()
    scale = fmt.largest / torch.where(usable, amax, fmt.largest)
    scale = scale.clamp(max=torch.finfo(dtype).max)
    if power_of_two:
        scale = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)
    return scale


def encode(scaled: Tensor, fmt: Format) -> Tensor:
    """Return float32 numbers as FP8: to nearest even, saturating, NaN kept."""
    # torch's cast turns what overflows into NaN (E4M3) or inf (E5M2).
    return scaled.clamp(-fmt.largest, fmt.largest).to(fmt.dtype)


def decode(data: Tensor, fmt: Format) -> Tensor:
    """Return FP8 numbers as float32."""
    if data.device.type != "cpu":
        return data.float()
    # torch's own conversion takes one element at a time on a CPU. An FP8 number is the top of a float32 with another
    # exponent bias: shifting its bits there and multiplying by the difference is exact, subnormals included.
    bits = data.view(torch.uint8).to(torch.int32)
    sign = (bits & 0x80) << 24
    shifted = ((bits & 0x7F) << (23 - fmt.mantissa_bits)) | sign
    value = shifted.view(torch.float32) * 2.0 ** (127 - fmt.exponent_bias)
    not_finite = (bits & 0x7F) >= (0x7F if fmt is E4M3 else 0x7C)
    if not_finite.any():
        value = torch.where(not_finite, data.float(), value)
    return value


def _cut(x: Tensor, tile: Tile) -> Tensor:
    """Return x [..., A, B] as [..., A / a, a, B / b, b], edges padded with zeros."""
    (rows, columns), (a, b) = x.shape[-2:], tile
    down, right = -rows % a, -columns % b
    if down or right:
        x = F.pad(x, (0, right, 0, down))
    return x.reshape(*x.shape[:-2], (rows + down) // a, a, (columns + right) // b, b)


def _scaled(x: Tensor, factors: Tensor, tile: Tile) -> Tensor:
    """Return x [..., A, B] times the factor of each element's tile."""
    rows, columns = x.shape[-2:]
    cut = _cut(x, tile) * factors[..., :, None, :, None]
    whole = cut.reshape(*x.shape[:-2], cut.shape[-4] * tile[0], cut.shape[-2] * tile[1])
    return whole[..., :rows, :columns]
