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
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_megatron.precision.formats import E4M3, Format
from dsv3_megatron.precision.kernels.available import usable

Tile = tuple[int, int]
KERNEL_TILES: tuple[Tile, ...] = ((1, 128), (128, 1), (128, 128))  # cut by one kernel on a GPU (kernels/quantise.py)


@dataclass(frozen=True)
class Quantised:
    """A tensor in FP8: ``data`` [..., A, B] and ``scale_inv`` float32 [..., ceil(A / a), ceil(B / b)]."""

    data: Tensor
    scale_inv: Tensor
    tile: Tile
    format: Format
    has_nan: bool = False

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return data * scale_inv [..., A, B], the float32 product rounded to ``dtype``."""
        if kernels := _kernels(self.data, self.tile):
            return kernels.dequantise(self.data, self.scale_inv, self.tile, self.format, dtype)
        plain = scaled_by_tile(decode(self.data, self.format, finite=not self.has_nan), self.scale_inv, self.tile)
        return plain.to(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes it occupies."""
        return self.data.nbytes + self.scale_inv.nbytes


def quantise(
    x: Tensor, tile: Tile, fmt: Format = E4M3, *, power_of_two: bool = True, amax: Tensor | None = None
) -> Quantised:
    """Return x [..., A, B] in FP8 with a scale per tile.

    Args:
        x: any floating dtype.
        tile: (a, b) elements; (0, 0) = the whole matrix is one tile.
        amax: float32 [..., ceil(A / a), ceil(B / b)], to scale by in place of the tiles' own largest magnitudes
            (delayed scaling); what is larger saturates.
    """
    if amax is None and (kernels := _kernels(x, tile)):
        data, scale_inv = kernels.quantise(x, tile, fmt, power_of_two=power_of_two)
        return Quantised(data, scale_inv, tile, fmt, has_nan=True)  # there may be one: nobody has looked
    tile = whole_tile(x, tile)
    own, has_nan, saturate = _largest_and_special(x, tile)
    scale = tile_scales(own if amax is None else amax, fmt, x.dtype, power_of_two=power_of_two)
    data = encode(scaled_by_tile(x.float(), scale, tile), fmt, saturate=saturate or amax is not None)
    return Quantised(data, 1.0 / scale, tile, fmt, has_nan)


def _kernels(x: Tensor, tile: Tile) -> ModuleType | None:
    """Return what cuts this tensor in one pass, or None where torch does in several."""
    if not usable(x) or tile not in KERNEL_TILES:
        return None
    from dsv3_megatron.precision.kernels import quantise as kernels  # needs triton

    return kernels


def _largest_and_special(x: Tensor, tile: Tile) -> tuple[Tensor, bool, bool]:
    """Return the tiles' largest magnitudes with NaN skipped, whether there may be NaN, and whether inf.

    A CPU looks, on the few numbers of the tiles, and saves itself passes over the elements. A GPU would have to wait
    for the answer, and makes the passes.
    """
    if x.device.type != "cpu":
        return largest_of_tiles(_without_nan(x), tile), True, True
    own = largest_of_tiles(x, tile)
    if has_nan := bool(own.isnan().any()):
        own = largest_of_tiles(_without_nan(x), tile)
    return own, has_nan, bool(own.isinf().any())


def _without_nan(x: Tensor) -> Tensor:
    return x.nan_to_num(0.0, posinf=float("inf"), neginf=float("-inf"))


def quantise_dequantise(x: Tensor, tile: Tile, fmt: Format = E4M3, *, power_of_two: bool = True) -> Tensor:
    """Return what of x [..., A, B] survives FP8, float32."""
    return quantise(x, tile, fmt, power_of_two=power_of_two).dequantise()


def whole_tile(x: Tensor, tile: Tile) -> Tile:
    """Return the tile, with (0, 0) standing for the whole matrix."""
    return tile if tile != (0, 0) else (max(x.shape[-2], 1), max(x.shape[-1], 1))


def largest_of_tiles(x: Tensor, tile: Tile) -> Tensor:
    """Return the largest magnitude of every tile of x [..., A, B], float32 [..., ceil(A / a), ceil(B / b)]."""
    return _cut(x.abs(), tile).amax(dim=(-3, -1)).float()


def tile_scales(amax: Tensor, fmt: Format, dtype: torch.dtype, *, power_of_two: bool) -> Tensor:
    """Return the scale of each tile from its largest magnitude; ``dtype`` is that of the tensor."""
    scale = _exact_scales(amax, fmt.largest, dtype)
    return _without_mantissa(scale) if power_of_two else scale


def power_of_two_scales(amax: Tensor, largest: float, dtype: torch.dtype) -> Tensor:
    """Return the largest power of two by which each tile can be multiplied without passing ``largest``."""
    return _without_mantissa(_exact_scales(amax, largest, dtype))


def _exact_scales(amax: Tensor, largest: float, dtype: torch.dtype) -> Tensor:
    usable = (amax > 0) & amax.isfinite()
    # Divided as tensors: torch makes a number divided by a tensor of a reciprocal, which rounds twice.
    scale = torch.full_like(amax, largest) / torch.where(usable, amax, largest)
    return scale.clamp(max=torch.finfo(dtype).max)


def _without_mantissa(scale: Tensor) -> Tensor:
    return (scale.view(torch.int32) & 0x7F800000).view(torch.float32)


def encode(scaled: Tensor, fmt: Format, *, saturate: bool = True) -> Tensor:
    """Return float32 numbers as FP8, to nearest even, NaN kept.

    ``saturate``: bring what is larger than the format's largest number there, as torch's cast makes NaN (E4M3) or inf
    (E5M2) of it; False where the scale has seen to that.
    """
    return (scaled.clamp(-fmt.largest, fmt.largest) if saturate else scaled).to(fmt.dtype)


def decode(data: Tensor, fmt: Format, *, finite: bool = False) -> Tensor:
    """Return FP8 numbers as float32. ``finite``: there is neither NaN nor inf among them."""
    if data.device.type != "cpu" or not finite:
        return data.float()
    # torch's own conversion takes one element at a time on a CPU. An FP8 number is the top of a float32 with another
    # exponent bias: shifting its bits there and multiplying by the difference is exact, subnormals included.
    bits = data.view(torch.int8).to(torch.int32)  # sign-extended: the sign is where float32 has it
    shifted = (bits << (23 - fmt.mantissa_bits)) & (-(1 << 31) | (0x7F << (23 - fmt.mantissa_bits)))
    return shifted.view(torch.float32) * 2.0 ** (127 - fmt.exponent_bias)


def _cut(x: Tensor, tile: Tile) -> Tensor:
    """Return x [..., A, B] as [..., A / a, a, B / b, b], edges padded with zeros; a tile that is larger than the matrix
    is cut to it."""
    rows, columns = x.shape[-2:]
    a, b = min(tile[0], max(rows, 1)), min(tile[1], max(columns, 1))
    down, right = -rows % a, -columns % b
    if down or right:
        x = F.pad(x, (0, right, 0, down))
    return x.reshape(*x.shape[:-2], (rows + down) // a, a, (columns + right) // b, b)


def scaled_by_tile(x: Tensor, factors: Tensor, tile: Tile) -> Tensor:
    """Return x [..., A, B] times the factor of each element's tile."""
    rows, columns = x.shape[-2:]
    cut = _cut(x, tile) * factors[..., :, None, :, None]
    whole = cut.reshape(*x.shape[:-2], cut.shape[-4] * cut.shape[-3], cut.shape[-2] * cut.shape[-1])
    return whole[..., :rows, :columns]
