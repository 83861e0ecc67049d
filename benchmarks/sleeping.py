"""Pipeline stages that sleep known times, for our engine and for torch.distributed.pipelining."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from parallel.pipeline.actions import Action
from parallel.pipeline.engine import Task
from parallel.pipeline.simulator import Times


class SleepingStages:
    """parallel.pipeline.engine.Stages whose passes only sleep; messages are small tensors."""

    def __init__(self, times: Times, last_stage: int):
        self._times, self._last = times, last_stage
        self._tensor = torch.zeros(16)

    def empty_message(self) -> Tensor:
        """Return a tensor to receive into."""
        return torch.empty(16)

    def forward(self, task: Task) -> None:
        """Sleep as long as a pass takes."""
        _sleep(self._times.of_pass(task.action))
        if task.action.stage != (self._last if task.action.kind == "F" else 0):
            task.emit(self._tensor)

    backward = forward

    def forward_backward(self, forward: Task, backward: Task) -> None:
        """Sleep as long as the two passes take, one after the other."""
        self.forward(forward)
        self.backward(backward)

    def weight_gradient(self, action: Action) -> None:
        """Sleep as long as a weight gradient takes."""
        _sleep(self._times.of_pass(action))

    def start_reduction(self, stage: int) -> None:
        """Nothing to reduce."""


def _sleep(seconds: float) -> None:
    if seconds:
        time.sleep(seconds)


class _Sleep(torch.autograd.Function):
    """The identity, whose forward and backward sleep."""

    @staticmethod
    def forward(ctx: object, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = backward
        _sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None, None]:
        _sleep(ctx.seconds)
        return grad.clone(), None, None


class SleepingModule(torch.nn.Module):
    """The same stage for torch: forward, input gradient and weight gradient sleep, each in its own autograd node."""

    def __init__(self, forward: float, input_grad: float, weight_grad: float):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(16))
        self._times = (forward, input_grad, weight_grad)

    def forward(self, x: Tensor) -> Tensor:
        """Return [1, 16] from [1, 16]."""
        forward, input_grad, weight_grad = self._times
        return _Sleep.apply(x, forward, input_grad) * _Sleep.apply(self.weight, 0.0, weight_grad)
