"""Weight gradients of all experts by one launch: total[e] += grad[rows of e]^T x[rows of e], float32.

cuBLAS serves one expert a call, looks for an algorithm for every new number of rows, and so keeps the host busy for 150
to 200 microseconds a call: with 32 small experts that was a third of a step (measured on an H200). Here the counts stay
on the device, and the host launches once.

Roofline: 2 T O I operations; bytes are those of grad and x, read once for each tile of the other (from L2 where tiles
of one expert run together), and total read and written once, 8 E O I. Products of small experts (O I below some 10^6)
wait for memory, those of large ones for the tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_OUT, _IN, _ROWS = 128, 128, 64  # a tile of the result, and rows summed over at a time: 32 KiB of operands a stage
_WARPS, _STAGES = 8, 4
_TOGETHER = 8  # tiles of O that run together over all of I, so that they share x in L2


def add_grouped(total: Tensor, grad: Tensor, x: Tensor, ends: Tensor) -> None:
    """Add to ``total`` [E, O, I] float32 each expert's grad^T x; experts without rows are left alone.

    Args:
        grad: [T, O]. x: [T, I], of the same dtype, both with unit stride along the second dimension.
        ends: [E] int32 on the same device: the last row of each expert, exclusive.
    """
    experts, out, inner = total.shape
    grad, x = (a if a.stride(-1) == 1 else a.contiguous() for a in (grad, x))
    tiles = triton.cdiv(out, _OUT) * triton.cdiv(inner, _IN)
    _kernel[(tiles, experts)](
        total, grad, x, ends, out, inner, *total.stride()[:2], grad.stride(0), x.stride(0),
        OUT=_OUT, IN=_IN, ROWS=_ROWS, TOGETHER=_TOGETHER, num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip


@triton.jit
def _kernel(
    total, grad, x, ends, out, inner, of_expert, of_row, of_grad, of_x,
    OUT: tl.constexpr, IN: tl.constexpr, ROWS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """One tile [OUT, IN] of one expert's gradient. ``of_...``: strides."""
    expert = tl.program_id(1)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    last = tl.load(ends + expert)
    if first == last:
        return
    # Tiles go down TOGETHER of them before they go across.
    number, high, wide = tl.program_id(0), tl.cdiv(out, OUT), tl.cdiv(inner, IN)
    band = number // (TOGETHER * wide)
    height = tl.minimum(high - band * TOGETHER, TOGETHER)
    row = band * TOGETHER + (number % (TOGETHER * wide)) % height
    column = (number % (TOGETHER * wide)) // height
    o = row * OUT + tl.arange(0, OUT)
    i = column * IN + tl.arange(0, IN)
    summed = tl.zeros((OUT, IN), dtype=tl.float32)
    for at in range(first, last, ROWS):
        rows = (at + tl.arange(0, ROWS)).to(tl.int64)
        there = (rows < last)[:, None]
        left = tl.load(grad + rows[:, None] * of_grad + o[None, :], mask=there & (o < out)[None, :], other=0.0)
        right = tl.load(x + rows[:, None] * of_x + i[None, :], mask=there & (i < inner)[None, :], other=0.0)
        summed = tl.dot(tl.trans(left), right, summed)
    place = total + expert.to(tl.int64) * of_expert + o.to(tl.int64)[:, None] * of_row + i[None, :]
    inside = (o < out)[:, None] & (i < inner)[None, :]
    tl.store(place, tl.load(place, mask=inside) + summed, mask=inside)
