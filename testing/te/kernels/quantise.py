"""Quantising by what a quantizer asks for: 1x128 and 128x128 tiles, or one scale a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from testing.te.kernels.blocks import quantise_blocks
from testing.te.kernels.whole import quantise_whole


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Any = None) -> Any:
    """Return ``tensor`` as the quantizer's class of tensors, or fill ``output``. Raises: NotImplementedError."""
    if noop is not None:
        raise NotImplementedError("testing/te: quantising that a flag on the device may skip (CUDA graphs)")
    name = type(quantizer).__name__
    if name == "Float8BlockQuantizer":
        return quantise_blocks(tensor, quantizer, output)
    if name in ("Float8Quantizer", "Float8CurrentScalingQuantizer"):
        return quantise_whole(tensor, quantizer, output)
    raise NotImplementedError(f"testing/te: {name}")


def split_quantize(
    tensor: Tensor, split_sections: list[int], quantizers: list, disable_bulk_allocation: bool = False
) -> list:
    """Return consecutive rows of ``tensor``, each by its own quantizer."""
    return [quantize(part, q) for part, q in zip(tensor.split(list(split_sections)), quantizers)]


def create_empty(quantizer: Any, shape: tuple, dtype: torch.dtype, device: torch.device, pin_memory: bool) -> Any:
    """Return a tensor of the quantizer's class (never its bare storage) that holds no numbers yet; here zeros."""
    was, quantizer.internal = quantizer.internal, False
    try:
        return quantize(torch.zeros(shape, dtype=dtype, device=device), quantizer)
    finally:
        quantizer.internal = was
