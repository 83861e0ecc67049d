"""TE's number formats as torch's."""

from __future__ import annotations

from functools import cache

import torch


@cache
def torch_dtype(dtype: object) -> torch.dtype:
    """Return torch's name of one of TE's."""
    from transformer_engine.pytorch.constants import TE_DType_To_Torch  # TE loads over these kernels

    return dtype if isinstance(dtype, torch.dtype) else TE_DType_To_Torch[dtype]


def largest(dtype: object) -> float:
    """Return the largest number of an FP8 format."""
    return torch.finfo(torch_dtype(dtype)).max
