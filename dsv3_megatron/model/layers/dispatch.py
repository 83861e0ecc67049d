"""Sending tokens to experts in FP8 and bringing results back in BF16, as DeepSeek-V3 does (arXiv 2412.19437, 3.3.3).

| what travels | forward | backward |
|---|---|---|
| dispatch: tokens to experts | FP8, 1x128, power-of-two scales | the tokens' gradients come back in BF16 |
| combine: experts' outputs back | BF16 | the outputs' gradients go to the experts in FP8 |

The first linear layer of an expert cuts its input into the same tiles, and power-of-two scales make cutting twice the
same as once: dispatching in FP8 costs half the traffic and no accuracy. The same numbers result at every EP.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from dsv3_megatron.precision.formats import E4M3
from dsv3_megatron.precision.tiles import Quantised, quantise

_TILE = (1, 128)


def dispatch_in_fp8(layer: MoELayer) -> None:
    """Let a MoE layer send FP8 from now on. Only the all-to-all dispatcher can: megatron-core moves BF16 by DeepEP."""
    dispatcher = layer.token_dispatcher
    assert type(dispatcher) is MoEAlltoAllTokenDispatcher, type(dispatcher).__name__
    dispatcher.__class__ = Fp8AllToAllDispatcher  # the same state; only the two all-to-alls differ


class Fp8AllToAllDispatcher(MoEAlltoAllTokenDispatcher):
    """All-to-all with tokens in FP8 one way."""

    def token_dispatch(self, permutated_local_input_tokens: Tensor, permuted_probs: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens [T, D] and router weights [T] for this rank's experts."""
        self.tokens_per_expert: Any = self._maybe_dtoh_and_synchronize("before_ep_alltoall", self.tokens_per_expert)
        to_experts = (self.ep_group, self.output_splits, self.input_splits)
        tokens = _AllToAll.apply(permutated_local_input_tokens, *to_experts, True, False)
        probs = _AllToAll.apply(permuted_probs, *to_experts, False, False)
        return tokens, probs

    def token_combine(
        self, hidden_states: Tensor, async_finish: bool = True, allocate_on_comm_stream: bool = True
    ) -> Tensor:
        """Return the experts' outputs for this rank's tokens, [T, D]."""
        return _AllToAll.apply(hidden_states, self.ep_group, self.input_splits, self.output_splits, False, True)


class _AllToAll(torch.autograd.Function):
    """Exchange rows [T, D] over a group; in FP8 forward, backward, or neither."""

    @staticmethod
    def forward(
        ctx: object,
        x: Tensor,
        group: dist.ProcessGroup,
        receive: list[int] | None,
        send: list[int] | None,
        fp8_forward: bool,
        fp8_backward: bool,
    ) -> Tensor:
        ctx.group, ctx.receive, ctx.send, ctx.fp8_backward = group, receive, send, fp8_backward
        return (_exchange_fp8 if fp8_forward else _exchange)(x, group, receive, send)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
        exchange = _exchange_fp8 if ctx.fp8_backward else _exchange
        return exchange(grad, ctx.group, ctx.send, ctx.receive), None, None, None, None, None


def _exchange(x: Tensor, group: dist.ProcessGroup, receive: list[int] | None, send: list[int] | None) -> Tensor:
    """Return the rows other ranks sent here, in the order of ranks."""
    if group.size() == 1:
        return x.view_as(x)
    rows = x.new_empty((sum(receive) if receive is not None else x.shape[0], *x.shape[1:]))
    dist.all_to_all_single(rows, x.contiguous(), receive, send, group=group)
    return rows


def _exchange_fp8(x: Tensor, group: dist.ProcessGroup, receive: list[int] | None, send: list[int] | None) -> Tensor:
    """Return the rows other ranks sent here as FP8 and scales, one message: [T, D + 4 ceil(D / 128)] bytes."""
    width = x.shape[-1]
    cut = quantise(x, _TILE)
    message = torch.cat([cut.data.view(torch.uint8), cut.scale_inv.view(torch.uint8)], dim=-1)
    rows = _exchange(message, group, receive, send)
    data = rows[:, :width].contiguous()
    scale_inv = rows[:, width:].contiguous().view(torch.float32)
    has_nan = data.device.type == "cpu" and bool(((data & 0x7F) == 0x7F).any())
    return Quantised(data.view(E4M3.dtype), scale_inv, _TILE, E4M3, has_nan).dequantise(x.dtype)
