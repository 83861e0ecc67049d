"""megatron-core's embedding, whose gradient goes to float32 row by row, and which passes one on where it has none."""

from __future__ import annotations

import types

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor

from dsv3_megatron.megatron.replaced import replaced
from dsv3_megatron.precision.weight_gradients import embedding

_FUNCTIONS = types.SimpleNamespace(embedding=embedding)


class VocabParallelEmbedding(layers.VocabParallelEmbedding):
    """Rows of a matrix whose rows are over TP ranks."""

    def forward(self, input_: Tensor) -> Tensor:
        """Return the embeddings of tokens [B, S].

        megatron-core's own forward looks them up with ``F.embedding``, the one name of ``F`` it uses (0.16.1); can go
        when the lookup is a method.

        What comes out of a frozen table asks for a gradient all the same: megatron-core's overlapped plan and its
        recomputation (0.16.1) hand none to the weights of a layer whose input asks for none.
        """
        with replaced(layers, "F", _FUNCTIONS):
            found = super().forward(input_)
        if self.training and torch.is_grad_enabled() and not found.requires_grad:
            return _WithGradient.apply(found, torch.empty(0, device=found.device, requires_grad=True))
        return found


class _WithGradient(torch.autograd.Function):
    """Makes a tensor ask for a gradient without keeping it (a leaf would, for as long as it lives)."""

    @staticmethod
    def forward(ctx: object, x: Tensor, asks: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[None, None]:
        return None, None
