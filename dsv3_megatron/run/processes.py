"""Work that is dealt to processes of this host, which end when the one that deals ends."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

from parallel.errors import DataError

S = TypeVar("S")
T = TypeVar("T")


def in_processes(do: Callable[[S], T], work: Sequence[S], workers: int) -> list[T]:
    """Return what ``do`` returns for each piece of work, in order; a single one, or a single worker, is this process.

    Raises: DataError: a worker was killed. What ``do`` raises.
    """
    if min(len(work), workers) < 2:
        return list(map(do, work))
    context = multiprocessing.get_context("spawn")  # not forked: torch and tokenizers run threads
    try:
        with ProcessPoolExecutor(min(len(work), workers), context, end_with_parent) as pool:
            return list(pool.map(do, work))
    except BrokenProcessPool:
        raise worker_killed(workers) from None


def worker_killed(workers: int) -> DataError:
    """Return what to say where one of ``workers`` processes was killed."""
    return DataError(
        "a worker was killed, perhaps for memory: what is done stays; start the same command again, with fewer "
        f"than workers = {workers}"
    )


def end_with_parent() -> None:
    """Make this process leave when its parent dies, however it dies.

    A worker would wait for work for ever, or go on writing files that the same command, started again, writes too.
    """
    threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    wait([parent.sentinel])
    os._exit(1)
