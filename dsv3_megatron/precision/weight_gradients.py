"""Weight gradients, computed and added up in float32 whatever the weights are (arXiv 2412.19437 section 3.3).

autograd hands a gradient on in the dtype of its weight: a BF16 weight's gradient would be rounded for every microbatch
before DDP adds it to its float32 buffer. What is here adds to that buffer itself and gives autograd nothing.

| weight | its gradient |
|---|---|
| linear layers, experts, MTP's projection, output head | product with a float32 result, added to the buffer |
| embedding | rows added to the buffer: no gradient of the whole vocabulary exists |
| router gate, norm gains (torch backend) | computed in float32, added to the buffer |

Without such a buffer (no DDP) the gradient is rounded once, into ``grad``. A frozen weight has neither, and nothing is
computed for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_megatron.precision.kernels.available import usable


@torch.no_grad()
def accumulate(weight: Tensor, add: Callable[[Tensor], object]) -> None:
    """Let ``add`` add a weight's gradient where the optimizer looks: to ``main_grad`` under DDP, else to ``grad``.

    ``add`` is given a tensor of the weight's shape in float32 (float64 for float64 weights).
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    buffer = getattr(weight, "main_grad", None)
    if buffer is not None and buffer.dtype == dtype:
        add(buffer)
        return
    total = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
    add(total)
    if buffer is not None:
        buffer.add_(total)
    elif weight.grad is None:
        weight.grad = total.to(weight.dtype)
    else:
        weight.grad.add_(total)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left [M, K] times right [K, N] to ``total`` [M, N], adding up in its dtype.

    BF16 operands are multiplied as they are where a GPU's units add up in float32; elsewhere as the float32 numbers
    they stand for, whose products are the same.
    """
    if left.dtype == right.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.device.type == "cuda" and left.dtype == right.dtype:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def add_grouped_product(
    total: Tensor, grad: Tensor, x: Tensor, rows: Sequence[int], ends: Tensor | None = None
) -> None:
    """Add to ``total`` [E, O, I] each expert's grad^T x, of its ``rows`` of grad [T, O] and x [T, I].

    On a GPU one launch for BF16 operands of small experts, where ``ends`` [E] int32 says there where the rows of each
    end. Elsewhere one product an expert: torch's grouped product has no float32 result of BF16 operands (2.13).
    """
    if ends is not None and grad.dtype == x.dtype == torch.bfloat16 and usable(total):
        # Imported here, as machines without a GPU need no triton.
        from dsv3_megatron.precision.kernels.weight_gradient import add_weight_gradients, serves

        if serves(*total.shape[1:]):
            add_weight_gradients(total, grad, x, ends)
            return
    for one, dy, rows_of_x in zip(total, grad.split(list(rows)), x.split(list(rows))):
        if len(dy):
            add_product(one, dy.t(), rows_of_x)


def in_float32(weight: Tensor) -> Tensor:
    """Return a weight in float32; its gradient is added up without being rounded to the weight's dtype."""
    return weight if weight.dtype == torch.float32 else _InFloat32.apply(weight)


class _InFloat32(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return weight.float()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> None:
        accumulate(ctx.weight, lambda total: total.add_(grad))


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Return the rows [..., D] of ``weight`` [V, D] that ``ids`` name."""
    if weight.dtype == torch.float32 or not torch.is_grad_enabled():
        return F.embedding(ids, weight)
    return _Embedding.apply(ids, weight)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.ids, ctx.weight = ids, weight
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[None, None]:
        ids, rows = ctx.ids.flatten(), grad.flatten(0, -2)

        def add(total: Tensor) -> None:
            # Which of several equal ids comes first must not depend on the run: on a GPU index_put_ sorts them, and
            # index_add_ does not; on a CPU it is the other way round.
            if total.device.type == "cuda":
                total.index_put_((ids,), rows.to(total.dtype), accumulate=True)
            else:
                total.index_add_(0, ids, rows.to(total.dtype))

        accumulate(ctx.weight, add)
        return None, None


def gate(x: Tensor, weight: Tensor, logits: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return ``logits(x, weight)`` [..., E], float32: x [..., D] times the transpose of ``weight`` [E, D]."""
    if weight.dtype == torch.float32 or not torch.is_grad_enabled():
        return logits(x, weight)
    return _Gate.apply(x, weight, logits)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, weight: Tensor, logits: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight = weight
        return logits(x, weight)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        if ctx.needs_input_grad[1]:
            accumulate(ctx.weight, lambda total: add_product(total, rows.t(), x.flatten(0, -2)))
        return (rows @ weight.to(grad.dtype)).to(x.dtype).view_as(x), None, None
