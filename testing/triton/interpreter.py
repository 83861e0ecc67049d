"""Triton's interpreter, in processes of their own: it is chosen where a kernel is defined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from testing.ranks import run_ranks

PRELOAD = "testing.triton.preload"


def interpreted(work: Callable[[Any], Any], cases: list[Any]) -> list[Any]:
    """Return ``work(case)`` of each case, run where Triton interprets. ``work`` imports the kernels itself.

    The interpreter multiplies BF16 operands as the integers that hold them (3.9): products take float16 here.
    """
    return [found for (found,) in run_ranks(1, work, cases, preload=PRELOAD)]
