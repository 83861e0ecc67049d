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
    grads, parameters, first, second = lists[:4]
    masters = lists[4] if len(lists) > 4 else parameters
    record("adam", tensors=len(grads), gradient=grads[0].dtype, parameter=parameters[0].dtype,
           moment=first[0].dtype, master=masters[0].dtype)  # fmt: skip
    how = (lr, beta1, beta2, eps, step, mode, bias_correction, weight_decay)
    for grad, parameter, m, v, master in zip(grads, parameters, first, second, masters):
        weight = _updated(master.float(), grad, m, v, *how)
        master.copy_(weight)
        parameter.copy_(weight)


def adam_with_remainders(
    chunk: int, noop: Tensor, lists: list[list[Tensor]], lr: float, beta1: float, beta2: float, eps: float, step: int,
    mode: int, bias_correction: int, weight_decay: float,
) -> None:  # fmt: skip
    """As :func:`adam`, of BF16 parameters whose masters' lower 16 bits lie apart (the fifth list)."""
    record("adam", tensors=len(lists[0]), gradient=lists[0][0].dtype, parameter=lists[1][0].dtype,
           moment=lists[2][0].dtype, master="remainder")  # fmt: skip
    how = (lr, beta1, beta2, eps, step, mode, bias_correction, weight_decay)
    for grad, parameter, m, v, remainder in zip(*lists):
        low = remainder.int()
        high = parameter.view(torch.int16).int() - (low < 0).int()  # a remainder below zero was rounded up
        bits = _updated(((high << 16) | (low & 0xFFFF)).view(torch.float32), grad, m, v, *how).view(torch.int32)
        remainder.copy_((bits & 0xFFFF).to(torch.int16))
        parameter.view(torch.int16).copy_(((bits >> 16) + (remainder < 0).int()).to(torch.int16))


def _updated(
    weight: Tensor, grad: Tensor, m: Tensor, v: Tensor, lr: float, beta1: float, beta2: float, eps: float, step: int,
    mode: int, bias_correction: int, weight_decay: float,
) -> Tensor:  # fmt: skip
    """Return float32 weights after one step of AdamW; the moments are updated in place."""
    if mode != _ADAMW:
        raise NotImplementedError("testing/te: Adam with L2 regularisation")
    correct = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1, 1)
    g = grad.float()
    m32, v32 = m.float().lerp(g, 1 - beta1), beta2 * v.float() + (1 - beta2) * g * g
    m.copy_(m32)
    v.copy_(v32)
    return weight - lr * ((m32 / correct[0]) / ((v32 / correct[1]).sqrt() + eps) + weight_decay * weight)


def scale(chunk: int, noop: Tensor, lists: list[list[Tensor]], factor: float) -> None:
    """Write the first list, times ``factor``, to the second."""
    for source, target in zip(*lists):
        target.copy_(source * factor)


def l2norm(chunk: int, noop: Tensor, lists: list[list[Tensor]], per_tensor: bool = False) -> tuple[Tensor, None]:
    """Return the norm [1] of all tensors together."""
    if per_tensor:
        raise NotImplementedError("testing/te: a norm for each tensor")
    return torch.stack([t.float().norm() for t in lists[0]]).norm().reshape(1), None
