"""The element formats of FP8 (Open Compute Project, OFP8)."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Format:
    """An FP8 element format."""

    name: str
    dtype: torch.dtype
    largest: float
    mantissa_bits: int
    exponent_bias: int


E4M3 = Format("e4m3", torch.float8_e4m3fn, 448.0, 3, 7)
E5M2 = Format("e5m2", torch.float8_e5m2, 57344.0, 2, 15)
