"""What a GEMM reads of an operand: a copy by rows or by columns, which must be there."""

from __future__ import annotations

import torch
from torch import Tensor

from testing.te.kernels.formats import torch_dtype

_ALIGNMENT = 16  # bytes: cuBLASLt's FP8 products want rows that begin at multiples of it


def read(operand: object, usage: str) -> Tensor:
    """Return what a product reads of ``operand``, as plain float32 [rows, columns].

    Args:
        operand: a plain tensor, or one of TE's quantised ones.
        usage: ``rowwise``, or ``columnwise``: the copy that was quantised along the other dimension.
    Raises: RuntimeError: that copy is not there (a GPU would read whatever lies at address 0), or of a shape that no
        FP8 kernel takes.
    """
    if hasattr(operand, "_rowwise_data"):
        return _blocks(operand, usage)
    if hasattr(operand, "_transpose"):
        return _whole(operand, usage)
    return operand.reshape(-1, operand.shape[-1]).float()


def _blocks(operand: object, usage: str) -> Tensor:
    data, scale = getattr(operand, f"_{usage}_data"), getattr(operand, f"_{usage}_scale_inv")
    _must_be_there(operand, usage, data is not None and scale is not None)
    numbers = _matrix(data, usage).view(torch_dtype(operand._fp8_dtype)).float()
    rows, columns = numbers.shape
    if operand._is_2D_scaled:
        scales = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    else:
        scales = scale.t()[:rows].repeat_interleave(128, 1)[:, :columns]
    found = numbers * scales
    return found if usage == "rowwise" else found.t()


def _whole(operand: object, usage: str) -> Tensor:
    by_rows = usage == "rowwise"
    data = operand._data if by_rows else operand._transpose
    _must_be_there(operand, usage, data is not None and (by_rows or not operand._transpose_invalid))
    found = _matrix(data, usage).view(torch_dtype(operand._fp8_dtype)).float() * operand._scale_inv
    return found if by_rows else found.t()


def _must_be_there(operand: object, usage: str, there: bool) -> None:
    if not there:
        raise RuntimeError(f"a GEMM reads the {usage} copy of a {type(operand).__name__}, which is not there")


def _matrix(data: Tensor, usage: str) -> Tensor:
    flat = data.reshape(-1, data.shape[-1]) if usage == "rowwise" else data.reshape(data.shape[0], -1)
    if flat.shape[-1] % _ALIGNMENT:
        raise RuntimeError(f"an FP8 GEMM reads rows of {flat.shape[-1]} bytes, no multiple of {_ALIGNMENT}")
    return flat


def is_empty(operand: object) -> bool:
    """Return whether an operand has no rows, as an expert's that no token was sent to."""
    return operand.size()[0] == 0


def kind(operand: object) -> str:
    """Return the name of an operand's class, as calls are noted."""
    return f"Tensor {operand.dtype}" if type(operand) in (Tensor, torch.nn.Parameter) else type(operand).__name__
