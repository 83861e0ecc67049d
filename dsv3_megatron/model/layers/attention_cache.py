"""The attention's output kept for backward once for two: the attention itself and the linear layer after it.

The paper keeps this one activation in E5M6, finer than FP8, because the attention's own backward reads it too
(arXiv 2412.19437 section 3.3.3); here it may also stay as it is. Fused attention saves its output inside autograd; the
copy it saves is exchanged here. Under context parallelism the two see it divided differently (model/layers/context.py),
and one copy serves both all the same: what is kept is sent around again in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from dsv3_megatron.precision.e5m6 import quantise_e5m6
from dsv3_megatron.precision.saved import attach_saved


class _Saved:
    """A tensor that autograd keeps, until it is exchanged for something smaller."""

    def __init__(self, tensor: Tensor):
        self.tensor: Tensor | None = tensor
        self.shape, self.stride = tuple(tensor.shape), tensor.stride()
        self._output: Callable[[], Tensor] | None = None

    def restore(self) -> Tensor:
        """Return the tensor, or what is kept in its place, in its shape [B, H, S, V or wider] and with its strides,
        padding as zeros.

        The strides matter: the backward of torch's memory-efficient attention takes the rows of an output to lie
        H * V numbers apart and asks nobody (``o_strideM`` in its kernel_backward.h, torch 2.13), where [S, B, H, V] has
        them B times as far: above one sequence a microbatch it would read those of another.
        """
        if self._output is None:
            assert self.tensor is not None, "neither the tensor nor what is kept in its place"
            return self.tensor
        kept = self._output().permute(1, 2, 0, 3)
        if kept.shape == self.shape and _same_memory(kept, self.stride):
            return kept.as_strided(self.shape, self.stride)
        restored = kept.new_empty_strided(self.shape, self.stride)
        width = kept.shape[-1]
        restored[..., width:] = 0
        restored[..., :width].copy_(kept)
        return restored

    def exchange(self, output: Callable[[], Tensor]) -> None:
        """Forget the tensor: ``output`` gives [S, B, H, V] of it back."""
        self._output, self.tensor = output, None


def _same_memory(tensor: Tensor, stride: tuple[int, ...]) -> bool:
    """Return whether other strides name the same places: those of dimensions of one do not count."""
    return all(n == 1 or own == other for n, own, other in zip(tensor.shape, tensor.stride(), stride))


class _AsItIs:
    """An output that is kept in its own dtype."""

    def __init__(self, flat: Tensor):
        self._flat = flat

    def dequantise(self) -> Tensor:
        """Return it in float32."""
        return self._flat.float()


class OutputCache:
    """Keeps one attention's output once. Use: run the attention inside ``watch()``, then ``keep(...)`` the output.

    Args:
        kind: ``e5m6`` or ``once`` (as it is) for attention and the linear layer after it; ``high``: to each its own.
        again: under context parallelism, turns an output [S / CP, B, H, V] into the [S, B, H / CP, V] that attention
            saw. It is kept once as well then, whatever the kind.
    """

    def __init__(self, kind: Literal["high", "once", "e5m6"], again: Callable[[Tensor], Tensor] | None = None) -> None:
        self._kind, self._again = kind, again
        self._wanted = (kind != "high" or again is not None) and torch.is_grad_enabled()
        self._saved: list[_Saved] = []

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Note what autograd saves inside the block."""
        if not self._wanted:
            yield
            return

        def note(tensor: Tensor) -> _Saved:
            self._saved.append(_Saved(tensor))
            return self._saved[-1]

        with torch.autograd.graph.saved_tensors_hooks(note, _Saved.restore):
            yield

    def keep(self, out: Tensor | None, heads: Tensor) -> Tensor:
        """Return ``heads`` [S, B, H, V] as [S, B, H * V], marked as kept; ``out`` [B, H, S, V or wider] is what
        attention gave.

        Attention that saved its probabilities and not its output, or went document by document (``out`` None), has
        nothing to exchange: the linear layer after it uses the cache all the same.
        """
        flat = heads.flatten(2)
        if not self._wanted:
            return flat
        with torch.no_grad():
            cache = quantise_e5m6(flat.detach()) if self._kind == "e5m6" else _AsItIs(flat.detach())
        shape, dtype, again = heads.shape, heads.dtype, self._again

        def output() -> Tensor:
            kept = cache.dequantise().to(dtype).view(shape)
            return kept if again is None else again(kept)

        for saved in self._saved:
            if saved.tensor.data_ptr() == out.data_ptr() and saved.tensor.shape == out.shape:
                saved.exchange(output)
        self._saved.clear()
        return flat if self._kind == "high" else attach_saved(flat, cache)
