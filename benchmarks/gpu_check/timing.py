"""How long something takes on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def milliseconds(run: Callable[..., Any], *given: Any, times: int = 5) -> float:
    """Return what ``run(*given)`` takes after a first time, the host's share included: a mean over ``times``."""
    import torch  # not where the checks are listed

    run(*given)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        run(*given)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / times * 1e3
