"""Weight gradients of all experts in one launch that needs no counts on the host.

Legend: T tokens sorted by expert, E local experts, O and I output and input width; ``ends`` [E] int32, where each
expert's rows end.

A program owns one tile of one expert's gradient: it multiplies through that expert's rows, adding up in float32, and
adds the result to memory once. No two programs write the same number, so the result is the same bits in every run.

Roofline: 2 T O I operations; read once, 2 T (O + I) bytes of BF16 operands, and 8 E O I bytes of float32 gradients are
read and written. An H100 (989 TFLOP/s, 3.35 TB/s) is bound by its tensor cores from about 1,200 rows an expert on;
below that the gradients' own traffic is the limit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_HOPPER_SHARED_MEMORY = 227 * 1024  # bytes a program can ask for


@dataclass(frozen=True)
class Tiling:
    """How one program works: its tile [o, i] of a gradient, the tokens it takes at a time, warps, copies in flight."""

    o: int
    i: int
    tokens: int
    warps: int
    stages: int

    def fitted(self, shared_memory: int) -> Tiling:
        """Return the tiling with no more stages than ``shared_memory`` bytes hold."""
        stage = 2 * self.tokens * (self.o + self.i)  # both operands take two bytes an element
        return Tiling(self.o, self.i, self.tokens, self.warps, max(1, min(self.stages, shared_memory // stage)))


# Narrow layers would spend most of a larger tile on columns that do not exist.
MIDDLE = Tiling(128, 128, 64, warps=4, stages=4)
NARROW = Tiling(64, 64, 64, warps=4, stages=4)
TILES_IN_GROUP = 8  # rows of tiles walked together, so that both operands' columns are found in L2


def tiling(o: int, i: int, shared_memory: int = _HOPPER_SHARED_MEMORY) -> Tiling:
    """Return how a gradient [o, i] is cut. A table, not autotuning: that would time kernels in the middle of a step."""
    return (MIDDLE if o >= 128 and i >= 128 else NARROW).fitted(shared_memory)


def serves(o: int, i: int) -> bool:
    """Return whether the kernel beats a product an expert for gradients [o, i].

    On an H200 it took 0.09 ms for 32 experts of 512 x 512 and 57,344 tokens, where 24 products took 0.56, most of it
    the host's; for 8 experts of DeepSeek-V3's 4096 x 7168 1.66 ms where those took 1.47, and 0.84 where 0.83.
    """
    return o < 1024 or i < 1024


def add_weight_gradients(total: Tensor, grad: Tensor, x: Tensor, ends: Tensor) -> None:
    """Add to ``total`` [E, O, I] float32 each expert's grad^T x, of its rows of grad [T, O] and x [T, I].

    grad and x are BF16 or float16. What belongs to an expert without rows is neither read nor written.

    Raises:
        ValueError: shapes or dtypes do not fit each other, or total's memory is not in one piece.
    """
    experts, o, i = total.shape
    if grad.shape != (len(x), o) or x.shape[1] != i or ends.shape != (experts,):
        shapes = [tuple(tensor.shape) for tensor in (total, grad, x, ends)]
        raise ValueError(f"total, grad, x and ends do not fit each other: {shapes}")
    if grad.dtype != x.dtype or grad.dtype.itemsize != 2 or total.dtype != torch.float32 or ends.dtype != torch.int32:
        raise ValueError(f"total {total.dtype}, grad {grad.dtype}, x {x.dtype}, ends {ends.dtype}: no such product")
    if not total.is_contiguous():
        raise ValueError("the gradients added to must be contiguous")
    if not total.numel() or not len(x):
        return
    cut = tiling(o, i, _shared_memory(total.device))
    grid = (triton.cdiv(o, cut.o) * triton.cdiv(i, cut.i), experts)
    add_product_kernel[grid](
        total, grad.contiguous(), x.contiguous(), ends, o, i,
        O_TILE=cut.o, I_TILE=cut.i, TOKENS=cut.tokens, GROUP=TILES_IN_GROUP,
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip


def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return _HOPPER_SHARED_MEMORY
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@triton.jit
def add_product_kernel(
    total, grad, x, ends, o_size, i_size,
    O_TILE: tl.constexpr, I_TILE: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Add one tile of one expert's grad^T x to ``total``; the grid is (tiles of a gradient, experts)."""
    expert = tl.program_id(1)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    rows = tl.load(ends + expert) - start
    if rows > 0:
        tile = tl.program_id(0)
        o_tiles, i_tiles = tl.cdiv(o_size, O_TILE), tl.cdiv(i_size, I_TILE)
        first = tile // (GROUP * i_tiles) * GROUP
        height = min(o_tiles - first, GROUP)
        within = tile % (GROUP * i_tiles)
        o = (first + within % height) * O_TILE + tl.arange(0, O_TILE)
        i = (within // height) * I_TILE + tl.arange(0, I_TILE)
        token = tl.arange(0, TOKENS)

        # 64 bits: all tokens' rows together may have more than 2^31 elements, those of one step of the loop have not.
        left = grad + start.to(tl.int64) * o_size + (o[:, None] + token[None, :] * o_size)
        right = x + start.to(tl.int64) * i_size + (token[:, None] * i_size + i[None, :])
        inside_o, inside_i = o < o_size, i < i_size
        found = tl.zeros((O_TILE, I_TILE), dtype=tl.float32)
        for done in range(0, rows, TOKENS):
            own = token < rows - done  # the rows after these belong to the next expert
            a = tl.load(left, mask=inside_o[:, None] & own[None, :], other=0.0)
            b = tl.load(right, mask=own[:, None] & inside_i[None, :], other=0.0)
            found = tl.dot(a, b, found)
            left += TOKENS * o_size
            right += TOKENS * i_size

        place = total + expert.to(tl.int64) * o_size * i_size + (o[:, None].to(tl.int64) * i_size + i[None, :])
        inside = inside_o[:, None] & inside_i[None, :]
        tl.store(place, tl.load(place, mask=inside, other=0.0) + found, mask=inside)
