"""Kernels over lists of tensors: AdamW, scaling, the norm."""

from __future__ import annotations

import torch
from torch import Tensor

from testing.te.calls import record

_ADAMW = 1


def adam(
    chunk: int, noop: Tensor, lists: list[list[Tensor]], lr: float, beta1: float, beta2: float, eps: float, step: int,
    mode: int, bias_correction: int, weight_decay: float,
) -> None:  # fmt: skip
    """Update (gradients, parameters, first moments, second moments and, where given, float32 masters) in place."""
    if mode != _ADAMW:
        raise NotImplementedError("testing/te: Adam with L2 regularisation")
    grads, parameters, first, second = lists[:4]
    masters = lists[4] if len(lists) > 4 else parameters
    record("adam", tensors=len(grads), gradient=grads[0].dtype, parameter=parameters[0].dtype,
           moment=first[0].dtype, master=masters[0].dtype)  # fmt: skip
    correct = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1, 1)
    for grad, parameter, m, v, master in zip(grads, parameters, first, second, masters):
        g, weight = grad.float(), master.float()
        m32, v32 = m.float().lerp(g, 1 - beta1), beta2 * v.float() + (1 - beta2) * g * g
        weight = weight - lr * ((m32 / correct[0]) / ((v32 / correct[1]).sqrt() + eps) + weight_decay * weight)
        for kept, new in ((m, m32), (v, v32), (master, weight), (parameter, weight)):
            kept.copy_(new)


def scale(chunk: int, noop: Tensor, lists: list[list[Tensor]], factor: float) -> None:
    """Write the first list, times ``factor``, to the second."""
    for source, target in zip(*lists):
        target.copy_(source * factor)


def l2norm(chunk: int, noop: Tensor, lists: list[list[Tensor]], per_tensor: bool = False) -> tuple[Tensor, None]:
    """Return the norm [1] of all tensors together."""
    if per_tensor:
        raise NotImplementedError("testing/te: a norm for each tensor")
    return torch.stack([t.float().norm() for t in lists[0]]).norm().reshape(1), None
