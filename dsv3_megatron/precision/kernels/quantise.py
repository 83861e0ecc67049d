"""Quantisation by tiles in one pass, bit for bit what precision/tiles.py makes in ten: its rules, for a GPU.

Roofline: an element is read once (2 bytes of BF16) and written once (1), a scale is written for each tile (4 bytes, of
128 elements or more): 3.03 bytes an element for 1x128. No operation counts beside that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3_megatron.precision.formats import Format
from dsv3_megatron.precision.kernels.formats import decode, encode, scale_of, size_of

_BESIDE = 32  # 1x128 or 128x1 tiles that a program serves


def quantise(x: Tensor, tile: tuple[int, int], fmt: Format, *, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Return x [..., A, B] in FP8 and its scale_inv float32 [..., ceil(A / a), ceil(B / b)];
    ``tile`` one of tiles.KERNEL_TILES."""
    (rows, columns), (a, b) = x.shape[-2:], tile
    data = torch.empty(x.shape, dtype=fmt.dtype, device=x.device)
    scale_inv = torch.empty(
        (*x.shape[:-2], triton.cdiv(rows, a), triton.cdiv(columns, b)), dtype=torch.float32, device=x.device
    )
    if not x.numel():
        return data, scale_inv
    # Tiles of one row: leading dimensions are more rows, copied where they cannot be walked with one stride. As
    # matrices of their own, [S, B, A] seen through a transpose would be S of B rows: idle programs, and a grid of S.
    matrices = x.reshape(1, -1, columns) if a == 1 else x.reshape(-1, rows, columns)
    block = (max(a, _BESIDE), max(b, _BESIDE))
    count, high, wide = matrices.shape
    grid = (triton.cdiv(high, block[0]), triton.cdiv(wide, block[1]), count)
    _quantise[grid](
        matrices, data.view(torch.uint8), scale_inv, high, wide, *matrices.stride(),
        A=a, B=b, ROWS=block[0], COLUMNS=block[1], M=fmt.mantissa_bits, BIAS=fmt.exponent_bias, LARGEST=fmt.largest,
        MOST=torch.finfo(x.dtype).max, POWER_OF_TWO=power_of_two, num_warps=8 if a > 1 else 4,
    )  # fmt: skip
    return data, scale_inv


def dequantise(data: Tensor, scale_inv: Tensor, tile: tuple[int, int], fmt: Format, dtype: torch.dtype) -> Tensor:
    """Return data [..., A, B] times the scale_inv of its tiles, as ``dtype``; ``tile`` one of
    tiles.KERNEL_TILES."""
    (rows, columns), (a, b) = data.shape[-2:], tile
    out = torch.empty(data.shape, dtype=dtype, device=data.device)
    if not data.numel():
        return out
    count = 1 if a == 1 else data.numel() // (rows * columns)
    high = data.numel() // columns // count
    block = (max(a, _BESIDE), max(b, _BESIDE))
    grid = (triton.cdiv(high, block[0]), triton.cdiv(columns, block[1]), count)
    _dequantise[grid](
        data.contiguous().view(torch.uint8), scale_inv.contiguous(), out, high, columns,
        A=a, B=b, ROWS=block[0], COLUMNS=block[1], M=fmt.mantissa_bits, BIAS=fmt.exponent_bias,
    )  # fmt: skip
    return out


@triton.jit
def _quantise(
    x, data, scale_inv, rows, columns, of_matrix, of_row, of_column,
    A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    M: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr, MOST: tl.constexpr, POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] of one matrix: 1x128 tiles side by side down the rows, 128x1 along them, or one of 128x128."""
    matrix = tl.program_id(2).to(tl.int64)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    from_here = matrix * of_matrix + r.to(tl.int64)[:, None] * of_row + c.to(tl.int64)[None, :] * of_column
    values = tl.load(x + from_here, mask=inside, other=0.0).to(tl.float32)
    sizes = size_of(values)
    high, wide = tl.cdiv(rows, A), tl.cdiv(columns, B)
    tiles = scale_inv + matrix * high * wide
    if A == 1:
        scale = scale_of(tl.max(sizes, axis=1), LARGEST, MOST, POWER_OF_TWO)
        tl.store(tiles + r.to(tl.int64) * wide + tl.program_id(1), tl.math.div_rn(1.0, scale), mask=r < rows)
        scaled = values * scale[:, None]
    elif B == 1:
        scale = scale_of(tl.max(sizes, axis=0), LARGEST, MOST, POWER_OF_TWO)
        tl.store(tiles + tl.program_id(0).to(tl.int64) * wide + c, tl.math.div_rn(1.0, scale), mask=c < columns)
        scaled = values * scale[None, :]
    else:
        scale = scale_of(tl.max(tl.max(sizes, axis=1, keep_dims=True), axis=0, keep_dims=True), LARGEST, MOST,
                         POWER_OF_TWO)  # fmt: skip
        place = tiles + tl.program_id(0).to(tl.int64) * wide + tl.program_id(1) + tl.zeros((1, 1), tl.int32)
        tl.store(place, tl.math.div_rn(1.0, scale))
        scaled = values * scale
    to_here = (matrix * rows + r.to(tl.int64)[:, None]) * columns + c[None, :]
    tl.store(data + to_here, encode(scaled, M, BIAS, LARGEST), mask=inside)


@triton.jit
def _dequantise(
    data, scale_inv, out, rows, columns,
    A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The way back of the same [ROWS, COLUMNS]."""
    matrix = tl.program_id(2).to(tl.int64)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    high, wide = tl.cdiv(rows, A), tl.cdiv(columns, B)
    here = (matrix * rows + r.to(tl.int64)[:, None]) * columns + c[None, :]
    tile = (matrix * high + (r // A).to(tl.int64)[:, None]) * wide + (c // B)[None, :]
    scale = tl.load(scale_inv + tile, mask=inside, other=0.0)
    values = decode(tl.load(data + here, mask=inside, other=0), M, BIAS) * scale
    tl.store(out + here, values.to(out.dtype.element_ty), mask=inside)
