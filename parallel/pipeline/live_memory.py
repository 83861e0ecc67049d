"""How many bytes of tensors are alive: counted at every operation, on real tensors and on fake ones alike.

A storage counts from the operation that makes it until the last tensor, closure or autograd node that holds it lets it
go, whoever that is: activations saved for backward, tensors kept in a queue, messages on their way. A storage that was
emptied in place (recomputation does that) counts as what it holds now.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts the storages made while it is entered; what existed before is not seen.

    Args:
        resolution_bytes: storages smaller than this are counted, but looked for a new peak only when a larger one is
            made: recounting at every small operation is slow.
    """

    def __init__(self, resolution_bytes: int = 0):
        super().__init__()
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._resolution = resolution_bytes
        self.peak_bytes = 0
        self._looking = True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run one operation and register what it made."""
        out = self.run(func, args, kwargs or {})
        if self._register(out, (args, kwargs)) >= self._resolution and self._looking:
            self.peak_bytes = max(self.peak_bytes, self.current_bytes())
        return out

    def run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Carry an operation out; what a subclass may do in another way."""
        return func(*args, **kwargs)

    def _register(self, out: Any, operands: Any) -> int:
        """Count the storages among an operation's outputs; return the bytes of the largest new one, -1 for none."""
        largest, before = -1, None
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            known = self._storages.get(storage._cdata)
            if known is not None and known() is storage:
                continue
            if before is None:  # what works in place, or gives a view, may return a storage older than this count
                before = {x.untyped_storage()._cdata for x in tree_leaves(operands) if isinstance(x, torch.Tensor)}
            if storage._cdata not in before:
                self._storages[storage._cdata] = weakref.ref(storage)
                largest = max(largest, storage.nbytes())
        return largest

    def current_bytes(self) -> int:
        """Return the bytes alive now."""
        total = 0
        for address, reference in list(self._storages.items()):
            storage = reference()
            if storage is None:
                del self._storages[address]
            else:
                total += storage.nbytes()
        return total

    @contextmanager
    def as_one_kernel(self) -> Iterator[None]:
        """Look for no peak inside, only at what is there when it ends: what comes and goes in a kernel stays in
        registers on the machine meant."""
        before, self._looking = self._looking, False
        try:
            yield
        finally:
            self._looking = before
        if before:
            self.peak_bytes = max(self.peak_bytes, self.current_bytes())

    def restart_peak(self) -> int:
        """Forget the peak so far; return the bytes alive now."""
        self.peak_bytes = self.current_bytes()
        return self.peak_bytes
