"""SwiGLU of the torch backend: silu(gate) * up, which keeps its input for backward and computes its output again.

With an FP8 cache the input is kept in 1x128 tiles, two bytes a column of the output, and the linear layer after it
keeps nothing: it takes the output from the same cache when its weight gradient is due (arXiv 2412.19437 section 3.3.3).

Legend: T tokens, I width of the output; the input is [gate | up], 2 I wide. ``probs`` [T, 1] weighs an expert's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_megatron.precision.formats import E4M3
from dsv3_megatron.precision.kernels.available import usable
from dsv3_megatron.precision.saved import attach_saved, saved_of
from dsv3_megatron.precision.tiles import Quantised, quantise

_TILE = (1, 128)


class SwiGLU(torch.nn.Module):
    """The activation between the two layers of a feed-forward block."""

    cache_in_fp8 = False  # set by the precision policy

    def __init__(self, config: object = None):
        super().__init__()

    def forward(self, gate_up: Tensor, probs: Tensor | None = None) -> Tensor:
        """Return [..., I] from [..., 2 I]."""
        if not torch.is_grad_enabled():
            return _output(gate_up, probs)
        if not self.cache_in_fp8:
            return _FromInput.apply(gate_up, probs)
        with torch.no_grad():
            # Detached: the cache outlives the backward where a weight gradient is deferred, and would hold all its
            # graph.
            out, kept = _output_and_cache(gate_up.detach(), None if probs is None else probs.detach())
        return attach_saved(_FromCache.apply(gate_up, probs, kept, out), kept)

    def sharded_state_dict(self, *unused: object, **also_unused: object) -> dict[str, object]:
        """Return nothing: there are no parameters. megatron-core asks every part of a feed-forward block."""
        return {}


def swiglu(gate_up: Tensor, probs: Tensor | None = None) -> Tensor:
    """Return silu(gate) * up, times ``probs`` where given, in the input's dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    out = F.silu(gate) * up
    return out if probs is None else (out * probs).to(gate_up.dtype)


def _kernels(gate_up: Tensor) -> ModuleType | None:
    """Return what computes on this tensor [..., 2 I] (or its cache) in one pass, or None where torch does in several.

    Tiles must not reach from gate into up.
    """
    if not usable(gate_up) or gate_up.shape[-1] % (2 * _TILE[1]) or gate_up.dtype is torch.float64:
        return None
    from dsv3_megatron.precision.kernels import swiglu as kernels  # needs triton

    return kernels


def _output(gate_up: Tensor, probs: Tensor | None) -> Tensor:
    if kernels := _kernels(gate_up):
        return kernels.activate(gate_up, probs, cached=False)[0]
    return swiglu(gate_up, probs)


def _output_and_cache(gate_up: Tensor, probs: Tensor | None) -> tuple[Tensor, _Cache]:
    if kernels := _kernels(gate_up):
        out, (data, scale_inv) = kernels.activate(gate_up, probs, cached=True)
        return out, _Cache(Quantised(data, scale_inv, _TILE, E4M3, has_nan=True), probs, gate_up.dtype)
    return swiglu(gate_up, probs), _Cache(quantise(gate_up, _TILE), probs, gate_up.dtype)


def give_back(activated: Tensor, output: Tensor) -> None:
    """Free the memory of SwiGLU's output now, and fill it again from the cache when the gradient of ``output`` comes.

    For layers that keep ``activated`` itself for backward, and compute ``output`` from it.
    """
    cache, storage = saved_of(activated), activated.untyped_storage()
    assert isinstance(cache, _Cache), "SwiGLU kept no cache"
    size = storage.nbytes()

    def fill(grad: Tensor) -> None:
        with torch.no_grad():
            again = cache.output().contiguous()
        storage.resize_(size)
        storage.copy_(again.untyped_storage())  # below autograd, which would take it for a change

    storage.resize_(0)
    output.register_hook(fill)


@dataclass(frozen=True)
class _Cache:
    """The input in FP8; what forward computed is computed again from it."""

    gate_up: Quantised
    probs: Tensor | None
    dtype: torch.dtype

    def input(self) -> Tensor:
        """Return what is left of the input [..., 2 I], in its dtype."""
        return self.gate_up.dequantise(self.dtype)

    def output(self) -> Tensor:
        """Return the output [..., I] of what is left of the input, in its dtype."""
        if kernels := _kernels(self.gate_up.data):
            return kernels.activate_again((self.gate_up.data, self.gate_up.scale_inv), self.probs, self.dtype)
        return swiglu(self.input(), self.probs)

    def gradients(self, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of the input and of ``probs``."""
        if kernels := _kernels(self.gate_up.data):
            return kernels.gradients(grad, None, (self.gate_up.data, self.gate_up.scale_inv), self.probs)
        return _gradients(grad, self.input(), self.probs)

    def dequantise(self) -> Tensor:
        """Return the output, float32."""
        return self.output().float()

    @property
    def nbytes(self) -> int:
        """Bytes it occupies."""
        return self.gate_up.nbytes


class _FromCache(torch.autograd.Function):
    """SwiGLU whose backward reads the cache."""

    @staticmethod
    def forward(ctx: object, gate_up: Tensor, probs: Tensor | None, cache: _Cache, out: Tensor) -> Tensor:
        ctx.cache = cache
        return out

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        cache, ctx.cache = ctx.cache, None
        return *cache.gradients(grad), None, None


class _FromInput(torch.autograd.Function):
    """SwiGLU that keeps its input alone: autograd would keep silu(gate), and what ``probs`` weighs, besides."""

    @staticmethod
    def forward(ctx: object, gate_up: Tensor, probs: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up, probs)
        return _output(gate_up, probs)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        gate_up, probs = ctx.saved_tensors
        if kernels := _kernels(gate_up):
            return kernels.gradients(grad, gate_up, None, probs)
        return _gradients(grad, gate_up, probs)


def _gradients(grad: Tensor, gate_up: Tensor, probs: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of ``gate_up`` and ``probs``, to the bit what autograd makes of ``swiglu``."""
    gate, up = gate_up.chunk(2, dim=-1)
    silu, to_probs = F.silu(gate), None
    if probs is not None:
        weighted = grad.to(torch.result_type(gate_up, probs))
        to_probs = (weighted * (silu * up)).sum(-1, keepdim=True).to(probs.dtype)
        grad = (weighted * probs).to(gate_up.dtype)
    to_gate_up = torch.empty_like(gate_up)
    to_gate, to_up = to_gate_up.chunk(2, dim=-1)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=to_gate)
    torch.mul(grad, silu, out=to_up)
    return to_gate_up, to_probs
