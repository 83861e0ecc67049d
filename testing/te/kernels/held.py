"""Weights held in FP8 blocks: a rank casts its shard of the float32 masters, scales taken over all ranks' shards."""

from __future__ import annotations

import torch
from torch import Tensor

from testing.te.calls import record
from testing.te.kernels.formats import largest, torch_dtype

_EXPONENT = 0x7F800000  # of a float32


def compute_scale_and_scale_inv(
    chunk: int, noop: Tensor, lists: list[list[Tensor]], top: float, power_of_two: bool, eps: float
) -> None:
    """Write to the second and third list the scales that bring the amaxes of the first to ``top``."""
    for amax, scale, scale_inv in zip(*lists):
        found = torch.where(amax == 0, torch.ones_like(amax), top / amax.clamp_min(eps))
        if power_of_two:
            found = (found.view(torch.int32) & _EXPONENT).view(torch.float32)
        scale.copy_(found)
        scale_inv.copy_(1 / found)


def compute_partial_amax(tensor: Tensor, amax: Tensor, rows: int, columns: int, start: int, block: int) -> None:
    """Raise ``amax`` [row blocks, column blocks] by a shard that begins at element ``start`` of [rows, columns]."""
    whole = torch.zeros(rows * columns, device=tensor.device)
    whole[start : start + tensor.numel()] = tensor.float().reshape(-1).abs()
    padded = torch.nn.functional.pad(whole.view(rows, columns), (0, -columns % block, 0, -rows % block))
    blocks = padded.view(-(-rows // block), block, -1, block).amax((1, 3))
    here = amax[: blocks.shape[0], : blocks.shape[1]]
    here.copy_(torch.maximum(here, blocks))


def partial_cast(
    source: Tensor, out: Tensor, scale: Tensor, rows: int, columns: int, start: int, block: int, dtype: object
) -> None:
    """Write a shard, scaled by its blocks, as FP8 bytes to ``out``."""
    scales = scale.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns].reshape(-1)
    record("partial_cast", shape=(rows, columns), elements=source.numel())
    top = largest(dtype)
    numbers = (source.float().reshape(-1) * scales[start : start + source.numel()]).clamp(-top, top)
    out.view(-1).copy_(numbers.to(torch_dtype(dtype)).view(torch.uint8))
