"""The attention's output kept for backward once for two: the attention itself and the linear layer after it.

The paper keeps this one activation in E5M6, finer than FP8, because the attention's own backward reads it too
(arXiv 2412.19437 section 3.3.3); here it may also stay as it is. Fused attention saves its output inside autograd; the
copy it saves is exchanged here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_megatron.precision.e5m6 import E5M6, quantise_e5m6
from dsv3_megatron.precision.kept import offer


class _Saved:
    """A tensor that autograd keeps, until it is exchanged for something smaller."""

    def __init__(self, tensor: Tensor):
        self.tensor: Tensor | None = tensor
        self.cache: E5M6 | _AsItIs | None = None
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype

    def restore(self) -> Tensor:
        """Return the tensor, or what the cache holds of it, in its shape [B, H, S, V] and dtype, padding as zeros."""
        if self.cache is None:
            return self.tensor
        batch, heads, sequence, width = self.shape
        kept = self.cache.dequantise().to(self.dtype).view(sequence, batch, heads, -1)
        return F.pad(kept, (0, width - kept.shape[-1])).permute(1, 2, 0, 3)

    def exchange(self, cache: E5M6 | _AsItIs) -> None:
        """Forget the tensor."""
        self.cache, self.tensor = cache, None


class _AsItIs:
    """An output that is kept in its own dtype."""

    def __init__(self, flat: Tensor):
        self._flat = flat

    def dequantise(self) -> Tensor:
        """Return it in float32."""
        return self._flat.float()


class OutputCache:
    """Keeps one attention's output once. Use: run the attention inside ``watch()``, then ``keep(out, flat)``."""

    def __init__(self, kind: Literal["once", "e5m6"]) -> None:
        self._kind = kind
        self._saved: list[_Saved] = []

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Note what autograd saves inside the block."""

        def note(tensor: Tensor) -> _Saved:
            self._saved.append(_Saved(tensor))
            return self._saved[-1]

        with torch.autograd.graph.saved_tensors_hooks(note, _Saved.restore):
            yield

    def keep(self, out: Tensor | None, flat: Tensor) -> Tensor:
        """Return ``flat`` [S, B, H * V] marked as kept; ``out`` [B, H, S, V or wider] is what attention gave.

        Attention that saved its probabilities and not its output, or went document by document (``out`` None), has
        nothing to exchange: the linear layer after it uses the cache all the same.
        """
        with torch.no_grad():
            cache = quantise_e5m6(flat.detach()) if self._kind == "e5m6" else _AsItIs(flat.detach())
        for saved in self._saved:
            if saved.tensor.data_ptr() == out.data_ptr() and saved.tensor.shape == out.shape:
                saved.exchange(cache)
        self._saved.clear()
        return offer(flat, cache)
