"""Quantising in tiles: 1x128 (activations, gradients) and 128x128 (weights), by the project's own emulation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv3_megatron.precision.formats import E4M3, E5M2, Format
from dsv3_megatron.precision.tiles import quantise
from testing.te.calls import record
from testing.te.kernels.formats import torch_dtype


def quantise_blocks(tensor: Tensor, quantizer: Any, output: Any) -> Any:
    """Return a ``Float8BlockwiseQTensor`` (its bare storage where the quantizer is internal), or fill ``output``."""
    parts = {usage: _cut(tensor, quantizer, usage) for usage in ("rowwise", "columnwise")
             if getattr(quantizer, f"{usage}_usage")}  # fmt: skip
    record("quantize", shape=tuple(tensor.shape), tile="128x128" if _is_2d(quantizer) else "1x128",
           usages=tuple(parts), into=output is not None)  # fmt: skip
    return _make(tensor, quantizer, parts) if output is None else _fill(output, parts)


def _is_2d(quantizer: Any) -> bool:
    return quantizer.block_scaling_dim == 2


def _cut(tensor: Tensor, quantizer: Any, usage: str) -> tuple[Tensor, Tensor]:
    """Return (numbers as bytes, scales) in the shapes and the order that TE stores them in."""
    columns = usage == "columnwise"
    rows = tensor.detach().reshape(-1, tensor.shape[-1])
    data, scale = _tiles(rows.t() if columns else rows, quantizer)
    shape = tuple(tensor.shape)
    stored = torch.zeros(quantizer.get_scale_shape(shape, columns), device=tensor.device)  # padded to multiples of 4
    scale = scale if _is_2d(quantizer) else scale.t()
    stored[: scale.shape[0], : scale.shape[1]] = scale
    return data.reshape(quantizer.get_columnwise_shape(shape) if columns else shape), stored


def _tiles(matrix: Tensor, quantizer: Any) -> tuple[Tensor, Tensor]:
    if matrix.numel() == 0:
        return matrix.new_empty(matrix.shape, dtype=torch.uint8), matrix.new_empty((0, 0), dtype=torch.float32)
    fmt: Format = E4M3 if torch_dtype(quantizer.dtype) == torch.float8_e4m3fn else E5M2
    tile = (128, 128) if _is_2d(quantizer) else (1, 128)
    found = quantise(matrix.contiguous(), tile, fmt, power_of_two=quantizer.force_pow_2_scales)
    return found.data.view(torch.uint8), found.scale_inv


def _make(tensor: Tensor, quantizer: Any, parts: dict[str, tuple[Tensor, Tensor]]) -> Any:
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockwiseQTensor
    from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage

    rows, columns = (parts.get(usage, (None, None)) for usage in ("rowwise", "columnwise"))
    fields = {
        "rowwise_data": rows[0],
        "rowwise_scale_inv": rows[1],
        "columnwise_data": columns[0],
        "columnwise_scale_inv": columns[1],
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
        "is_2D_scaled": _is_2d(quantizer),
    }
    if quantizer.internal:
        return Float8BlockwiseQTensorStorage(**fields, fake_dtype=tensor.dtype)
    return Float8BlockwiseQTensor(shape=tuple(tensor.shape), dtype=tensor.dtype, device=tensor.device, **fields)


def _fill(output: Any, parts: dict[str, tuple[Tensor, Tensor]]) -> Any:
    """Write in place; what the quantizer does not ask for goes, as TE's convert_and_update_tensor lets it."""
    for usage in ("rowwise", "columnwise"):
        data, scale = parts.get(usage, (None, None))
        for name, value in ((f"_{usage}_data", data), (f"_{usage}_scale_inv", scale)):
            there = getattr(output, name)
            if value is None or there is None:
                setattr(output, name, value)
            else:
                there.copy_(value)
    return output
