"""Weights in FP8 as files hold them: DeepSeek-V3's published format, a float32 ``weight_scale_inv`` per 128x128 block.

w = float8 data times the scale of its block; edge blocks are partial. Source: DeepSeek-V3's README_WEIGHTS.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3_megatron.precision.tiles import E4M3, Quantised, quantise

BLOCK = (128, 128)


def quantise_weight(weight: Tensor, *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Return a weight [..., N, K] as (float8_e4m3fn [..., N, K], float32 scale_inv [..., ceil(N/128), ceil(K/128)]).

    ``power_of_two``: the scales that training with power-of-two scales used, so that the file holds, bit for bit, the
    numbers its products were made of. The default uses all of the format's range, as the published files do.
    """
    found = quantise(weight, BLOCK, E4M3, power_of_two=power_of_two)
    return found.data, found.scale_inv


def dequantise_weight(data: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return the weight [..., N, K] that a file's FP8 numbers and block scales stand for.

    Raises: ValueError: the scales are not of one 128x128 block each.
    """
    blocks = tuple(-(-size // 128) for size in data.shape[-2:])
    if tuple(scale_inv.shape[-2:]) != blocks or scale_inv.shape[:-2] != data.shape[:-2]:
        raise ValueError(
            f"scale_inv {tuple(scale_inv.shape)} for a weight {tuple(data.shape)}: {blocks} blocks expected"
        )
    return Quantised(data, scale_inv.float(), BLOCK, E4M3, has_nan=True).dequantise().to(dtype)
