"""Whether Triton's kernels can be used."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from torch import Tensor


def usable(tensor: Tensor) -> bool:
    """Return whether Triton's kernels can take the tensor: it is on a GPU and triton is installed."""
    return tensor.device.type == "cuda" and installed()


@cache
def installed() -> bool:
    """Return whether triton can be imported."""
    return find_spec("triton") is not None
