"""RMSNorm of the torch backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_megatron.precision.weight_gradients import in_float32


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm, computed in float32, gain of ones at the start.

    Under sequence parallelism every TP rank norms other tokens, so the gain's gradient must be summed over TP: the
    mark ``sequence_parallel`` on the parameter tells megatron-core (its own WrappedTorchNorm refuses that case).
    """

    def __init__(self, config: object, hidden_size: int, eps: float = 1e-6, **unused: object):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed [..., D] in the dtype of ``x``."""
        if x.dtype == torch.float32:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return F.rms_norm(x.float(), x.shape[-1:], in_float32(self.weight), self.eps).to(x.dtype)
