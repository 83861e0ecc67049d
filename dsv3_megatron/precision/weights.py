"""Weights in FP8 as files hold them: E4M3 numbers and the scales that they are multiplied by.

w = float8 data times the scale of its tile; edge tiles are partial. DeepSeek-V3 publishes a float32
``weight_scale_inv`` per 128x128 block, V3.1 powers of two; others publish other blocks, one scale a row, or one a
matrix. Source: DeepSeek-V3's README_WEIGHTS.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv3_megatron.precision.tiles import (
    E4M3,
    Quantised,
    Tile,
    decode,
    encode,
    largest_of_tiles,
    quantise,
    scaled_by_tile,
)

BLOCK = (128, 128)
_STRIP = 8  # rows of blocks that are requantised at a time, which takes several copies of them


def quantise_weight(weight: Tensor, *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Return a weight [..., N, K] as (float8_e4m3fn [..., N, K], float32 scale_inv [..., ceil(N/128), ceil(K/128)]).

    ``power_of_two``: the scales that training with power-of-two scales used, so that the file holds, bit for bit, the
    numbers its products were made of. The default uses all of the format's range, as the published files do.
    """
    found = quantise(weight, BLOCK, E4M3, power_of_two=power_of_two)
    return found.data, found.scale_inv


def requantise_weight(weight: Tensor, published: Tensor, *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Return what :func:`quantise_weight` does, but a block that is still as published as it was published.

    Numbers alone do not tell their scale: 448 with scale 1 is 224 with scale 2. With the scale that a block came with
    they tell all: a product of an E4M3 number and a scale, rounded to BF16 or float32, is off by 2^-9 of itself at
    most, and E4M3's numbers are at least 2^-4 of themselves apart, so that dividing and rounding finds the number
    again (for scales from 2^-117, below which products are subnormal in float32). A block whose products are then not
    the weight, all of them, has been trained, and gets a scale of its own.

    Args:
        weight: [N, K].
        published: float32 scale_inv [ceil(N/128), ceil(K/128)] that the weight was made with.
    """
    strips = zip(weight.split(_STRIP * BLOCK[0]), published.split(_STRIP))
    found = [_requantise(rows.float(), scales, power_of_two=power_of_two) for rows, scales in strips]
    return torch.cat([data for data, _ in found]), torch.cat([scales for _, scales in found])


def _requantise(weight: Tensor, published: Tensor, *, power_of_two: bool) -> tuple[Tensor, Tensor]:
    data, scale_inv = quantise_weight(weight, power_of_two=power_of_two)
    scales = scaled_by_tile(torch.ones_like(weight), published, BLOCK)
    before = encode(weight / scales, E4M3)
    products = decode(before, E4M3, finite=True) * scales
    is_other = (products != weight) & (products.bfloat16().float() != weight)
    trained = largest_of_tiles(is_other.float(), BLOCK)  # 1 or 0 a block
    kept = scaled_by_tile(torch.ones_like(weight), trained, BLOCK) == 0
    data = torch.where(kept, before.view(torch.uint8), data.view(torch.uint8)).view(E4M3.dtype)
    return data, torch.where(trained == 0, published, scale_inv)


def tile_of_scales(weight: tuple[int, ...], scales: tuple[int, ...], block: Tile | None, *, or_coarser: bool) -> Tile:
    """Return the elements of a weight that share a scale, as the shapes of both tell.

    Args:
        weight: [N, K].
        scales: [ceil(N / block), ceil(K / block)]; with ``or_coarser`` also [N, 1] or [N], one a row, and one number
            (any shape). One number is right for a matrix of one block, too.
        block: None where scales are not of blocks.
    Raises: ValueError: the shape is none of these.
    """
    rows, columns = weight
    whole = (max(rows, 1), max(columns, 1))
    grid = None if block is None else (-(-rows // block[0]), -(-columns // block[1]))
    if block is not None and scales == grid:
        return block
    if math.prod(scales) == 1 and (or_coarser or grid == (1, 1)):
        return whole
    if or_coarser and scales in ((rows, 1), (rows,)):
        return 1, whole[1]
    wanted = [] if grid is None else [f"{list(grid)}, one a block"]
    wanted += [f"[{rows}, 1], one a row", "one number"] if or_coarser else []
    raise ValueError(f"scales {list(scales)} do not fit a weight {list(weight)}, which needs {', or '.join(wanted)}")


def dequantise_weight(
    data: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.bfloat16, *, tile: Tile = BLOCK
) -> Tensor:
    """Return the weight [..., N, K] that a file's FP8 numbers and scales, one a ``tile`` of elements, stand for.

    Raises: ValueError: there is not one scale a tile.
    """
    rows, columns = data.shape[-2:]
    grid = (*data.shape[:-2], -(-rows // tile[0]), -(-columns // tile[1]))
    same = [grid] + [grid[:-1]] * (grid[-1] == 1) + [()] * (math.prod(grid) == 1)  # a row's or a matrix' needs no axis
    if tuple(scale_inv.shape) not in same:
        raise ValueError(
            f"scale_inv {tuple(scale_inv.shape)} for a weight {tuple(data.shape)}: {grid[-2:]} blocks expected"
        )
    return Quantised(data, scale_inv.float().reshape(grid), tile, E4M3, has_nan=True).dequantise(dtype)
