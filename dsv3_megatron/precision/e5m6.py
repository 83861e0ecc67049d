"""E5M6: the 12-bit format in which DeepSeek-V3 keeps the input of the linear layer after attention.

Sign, 5 exponent bits (bias 15), 6 mantissa bits, tiles of 1x128 with power-of-two scales: cutting the tiles anew along
tokens then adds no error of its own (arXiv 2412.19437 section 3.3.3). Two numbers are held in three bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_megatron.precision.tiles import largest_of_tiles, power_of_two_scales, scaled_by_tile

LARGEST = (2 - 2**-6) * 2.0**15
_TILE = (1, 128)
_MANTISSA_BITS, _LEAST_EXPONENT = 6, -14


@dataclass(frozen=True)
class E5M6:
    """A tensor in E5M6: ``data`` uint8 [..., 3 * ceil(K / 2)], ``scale_inv`` float32 [..., ceil(K / 128)], K wide."""

    data: Tensor
    scale_inv: Tensor
    width: int

    def dequantise(self) -> Tensor:
        """Return float32 [..., K]."""
        numbers = _unpack(self.data)[..., : self.width]
        return scaled_by_tile(numbers, self.scale_inv, _TILE)

    @property
    def nbytes(self) -> int:
        """Bytes it occupies."""
        return self.data.nbytes + self.scale_inv.nbytes


def quantise_e5m6(x: Tensor) -> E5M6:
    """Return x [..., K], any floating dtype, in E5M6 with a power-of-two scale per 128 numbers of the last axis."""
    scale = power_of_two_scales(largest_of_tiles(x, _TILE), LARGEST, x.dtype)
    return E5M6(_pack(_rounded(scaled_by_tile(x.float(), scale, _TILE))), 1.0 / scale, x.shape[-1])


def _rounded(x: Tensor) -> Tensor:
    """Return float32 numbers rounded to E5M6, to nearest even, saturating. NaN stays NaN."""
    exponent = torch.frexp(x).exponent - 1
    step = torch.ldexp(torch.ones_like(x), exponent.clamp(min=_LEAST_EXPONENT) - _MANTISSA_BITS)
    return ((x / step).round() * step).clamp(-LARGEST, LARGEST)


def _pack(x: Tensor) -> Tensor:
    """Return E5M6 numbers [..., K] as bytes. They are float16 numbers whose last four mantissa bits are zero."""
    bits = (x.half().view(torch.int16).int() >> 4) & 0xFFF
    if x.shape[-1] % 2:
        bits = F.pad(bits, (0, 1))
    first, second = bits[..., 0::2], bits[..., 1::2]
    bytes_ = torch.stack([first >> 4, ((first & 0xF) << 4) | (second >> 8), second & 0xFF], dim=-1)
    return bytes_.to(torch.uint8).flatten(-2)


def _unpack(data: Tensor) -> Tensor:
    """Return the float32 numbers that bytes stand for; one more than was packed where that was odd."""
    high, middle, low = data.int().unflatten(-1, (-1, 3)).unbind(-1)
    bits = torch.stack([(high << 4) | (middle >> 4), ((middle & 0xF) << 8) | low], dim=-1).flatten(-2)
    return (bits << 4).to(torch.int16).view(torch.float16).float()
