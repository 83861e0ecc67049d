"""Numbers at which a conversion to FP8 can go wrong, by kind: for the kernels' tests and for ``make gpu-check``."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("plain", "wide", "tiny", "special", "edges", "zeros")


def numbers(kind: str, shape: tuple[int, ...]) -> Tensor:
    """Return float32 numbers of a kind, the same for a shape every time.

    *wide*: over 50 orders of magnitude; *tiny*: subnormal; *special*: NaN and infinities among them; *edges*: the
    numbers of E4M3 and what lies half-way between neighbours, scaled by one.
    """
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    if kind == "wide":
        return x * torch.exp(20 * torch.randn(shape, generator=torch.Generator().manual_seed(2)))
    if kind == "tiny":
        return x * 1e-38
    if kind == "zeros":
        return torch.zeros(shape)
    if kind == "special" and x.numel():
        x[..., 0] = float("nan")
        x[0, ..., -1], x[-1, ..., -1] = float("inf"), -float("inf")
    if kind == "edges" and x.numel():
        codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(0)
        between = torch.cat([codes, (codes + codes.roll(1)) / 2, codes * 0.999])
        x = between[torch.arange(x.numel()) % len(between)].view(shape)
        x[..., 0] = 448.0
    return x
