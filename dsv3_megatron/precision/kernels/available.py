"""Whether the kernels of this folder can be used."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from torch import Tensor


def usable(tensor: Tensor) -> bool:
    """Return whether Triton's kernels can take the tensor: it is on a GPU and triton is installed."""
    return tensor.device.type == "cuda" and _installed()


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
