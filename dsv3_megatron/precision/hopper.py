"""FP8 products by torch's own block-scaled matmul, on Hopper GPUs without Transformer Engine.

``torch.nn.functional.scaled_mm`` takes both operands contiguous along the summed dimension, 1x128 scales of the left
one as [M, K / 128] with unit stride along M, and of the right one 1x128 as [N, K / 128] likewise, or 128x128 as
[K / 128 padded to a multiple of 4, N / 128] with unit stride along K. Scales are multipliers (scale_inv). The same FP8
numbers and scales as in the emulation; only the adding up is the tensor core's. Experts, and layers whose widths are
no multiples of 128, stay emulated: torch has no block-scaled grouped product for Hopper.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_megatron.precision.products import Fp8Products
from dsv3_megatron.precision.saved import Columns, SavedOperand
from dsv3_megatron.precision.settings import PAPER_TILES, Fp8Settings
from dsv3_megatron.precision.tiles import Quantised


def why_not(fp8: Fp8Settings, device: torch.device) -> str | None:
    """Return why torch's block-scaled products cannot be used, or None where they can."""
    if device.type != "cuda":
        return "there is no GPU"
    if not hasattr(F, "scaled_mm"):
        return f"torch {torch.__version__} has no scaled_mm"
    if torch.cuda.get_device_capability(device) != (9, 0):
        return "torch multiplies 1x128 by 128x128 tiles on Hopper only"
    cuda = torch.version.cuda or "0.0"
    if tuple(int(part) for part in cuda.split(".")[:2]) < (12, 9):
        return f"torch is built for CUDA {cuda}, and 12.9 is needed"
    if fp8.tiles != PAPER_TILES:
        return f"tiles {', '.join(fp8.tiles)} are not the paper's"
    if fp8.accumulation != "fp32":
        return f"accumulation = {fp8.accumulation}"
    return None


class HopperFp8(Fp8Products):
    """The three products of a dense linear layer on a Hopper GPU."""

    name = "scaled_mm"

    def fprop(self, x: Quantised, weight: Tensor, ends: Tensor | None) -> Tensor:
        """Return Y [T, O], BF16."""
        if ends is not None or not _divides(*weight.shape):
            return super().fprop(x, weight, ends)
        return multiply(x, self.quantised_weight(weight))

    def dgrad(self, dy: Quantised, weight: Tensor, ends: Tensor | None) -> Tensor:
        """Return dX [T, I], BF16."""
        if ends is not None or not _divides(*weight.shape):
            return super().dgrad(dy, weight, ends)
        w = self.quantised_weight(weight)
        return multiply(dy, transposed(w))

    def wgrad(
        self, total: Tensor, dy: SavedOperand, x: SavedOperand, ends: Tensor | None, rows: Sequence[int] | None
    ) -> None:
        """Add dW to ``total`` [O, I], float32. Tokens are summed over, so the last tile is filled up with zeros."""
        if rows is not None or not isinstance(dy, Columns) or not isinstance(x, Columns):
            super().wgrad(total, dy, x, ends, rows)
            return
        left, right = transposed(dy.quantised), transposed(x.quantised)
        if not _divides(left.data.shape[0], right.data.shape[0]):
            super().wgrad(total, dy, x, ends, rows)
            return
        total.add_(multiply(filled(left), filled(right), torch.float32))


def multiply(a: Quantised, b: Quantised, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return a [M, K] times the transpose of b [N, K], K a multiple of 128; b's tiles are 1x128 or 128x128."""
    kinds = {(1, 128): F.ScalingType.BlockWise1x128, (128, 128): F.ScalingType.BlockWise128x128}
    return F.scaled_mm(
        a.data,
        b.data.t(),
        along_rows(a.scale_inv),
        kinds[a.tile],
        along_rows(b.scale_inv) if b.tile[0] == 1 else blocks(b.scale_inv),
        kinds[b.tile],
        output_dtype=dtype,
    )


def along_rows(scale_inv: Tensor) -> Tensor:
    """Return scales [M, K / 128] with unit stride along M."""
    return scale_inv.t().contiguous().t()


def blocks(scale_inv: Tensor) -> Tensor:
    """Return scales [N / 128, K / 128] as [K / 128 padded to a multiple of 4, N / 128], unit stride along K."""
    return F.pad(scale_inv, (0, -scale_inv.shape[1] % 4)).contiguous().t()


def transposed(x: Quantised) -> Quantised:
    """Return the same numbers [B, A] from [A, B], contiguous along A."""
    data = x.data.view(torch.uint8).t().contiguous().view(x.data.dtype)
    return Quantised(data, x.scale_inv.t().contiguous(), x.tile[::-1], x.format, x.has_nan)


def filled(x: Quantised) -> Quantised:
    """Return x [A, B] with columns of zeros up to a multiple of 128; the last tiles' scales hold for them."""
    if not (missing := -x.data.shape[1] % 128):
        return x
    data = F.pad(x.data.view(torch.uint8), (0, missing)).view(x.data.dtype)
    return Quantised(data, x.scale_inv, x.tile, x.format, x.has_nan)


def _divides(*sizes: int) -> bool:
    return all(size % 128 == 0 for size in sizes)
