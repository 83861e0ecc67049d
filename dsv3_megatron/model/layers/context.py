"""Context parallelism by heads: each rank attends with its share of the heads over the whole sequence.

Outside attention a rank holds two pieces of every sequence and all heads. All-to-alls exchange that for the whole
sequence and 1/CP of the heads, and back (DeepSpeed-Ulysses, arXiv 2309.14509 section 3). MLA has a key and a value for
every head (arXiv 2412.19437 section 2.1.1): to gather those instead would send CP / 2 times as much and hold CP times
as much. And a whole sequence needs no mask of its own: fused causal attention and documents work as on one rank.

Shapes: S the whole sequence, B microbatch, H heads of a TP rank, W width of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

_Gather = Callable[[Tensor, dist.ProcessGroup], Tensor]


def to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return [S, B, H / CP, W], in the order of the sequence, of ``x`` [S / CP, B, H, W]: pieces r and 2 CP - 1 - r."""
    return _ThereAndBack.apply(x, group, _gather_sequence, _gather_heads)


def to_pieces(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return [S / CP, B, H, W] of ``x`` [S, B, H / CP, W]: what :func:`to_heads` undoes."""
    return _ThereAndBack.apply(x, group, _gather_heads, _gather_sequence)


class _ThereAndBack(torch.autograd.Function):
    """One exchange in forward, the one that undoes it in backward."""

    @staticmethod
    def forward(ctx: object, x: Tensor, group: dist.ProcessGroup, there: _Gather, back: _Gather) -> Tensor:
        ctx.group, ctx.back = group, back
        return there(x, group)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(grad, ctx.group), None, None, None


def _gather_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    by_heads = x.unflatten(2, (group.size(), -1)).movedim(2, 0)  # [CP, S / CP, B, H / CP, W]
    first, second = _exchange(by_heads, group).chunk(2, dim=1)  # pieces r, pieces 2 CP - 1 - r
    return torch.cat([first.flatten(0, 1), second.flip(0).flatten(0, 1)])


def _gather_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    first, second = x.unflatten(0, (2, group.size(), -1))  # pieces 0 to CP - 1, pieces CP to 2 CP - 1
    by_rank = _exchange(torch.cat([first, second.flip(0)], dim=1), group)  # [CP, S / CP, B, H / CP, W]
    return by_rank.movedim(0, 2).flatten(2, 3)


def _exchange(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send ``x[r]`` to rank r; return what came, by sender."""
    x = x.contiguous()
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=group)
    return received
