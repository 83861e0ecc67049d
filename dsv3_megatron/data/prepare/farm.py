"""Tasks over processes: each reads, unpacks, encodes and writes for itself, and the parent only deals and notes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any

from dsv3_megatron.data.prepare.encode import Done, Encoding, do_task, start_worker
from dsv3_megatron.data.prepare.plan import Task, Unit, tasks_left
from dsv3_megatron.run.processes import worker_killed

_LOOK_SECONDS = 0.2


def encode_all(
    units: list[Unit],
    done: list[Done],
    encoding: Encoding,
    *,
    workers: int,
    keep: Callable[[Done], None],
    look: Callable[[int, int], None],
) -> None:
    """Do the tasks of units that are not done.

    Args:
        done: what earlier runs did; what is done here is appended.
        keep: called with each task that is done, when it is in ``done``, to remember it.
        look: called several times a second with the bytes read and the tokens written since the call.
    Raises: DataError: too much cannot be read, or a worker was killed.
    """
    by_unit: dict[tuple[int, int], dict[int, Done]] = {}
    for task in done:
        by_unit.setdefault(task.key[:2], {})[task.key[2]] = task
    first = sum(1 for _ in tasks_left(units, by_unit))
    if not first:
        return
    processes = min(workers, first)
    # Spawned, not forked: the tokenizer's library must not be forked once it has run threads.
    context = multiprocessing.get_context("spawn")
    stopping, read, tokens = context.Event(), context.Value("q", 0), context.Value("q", 0)
    # Fewer tasks than cores: each encodes on several.
    shared = (replace(encoding, threads=max(1, workers // processes)), stopping, read, tokens)
    pool = ProcessPoolExecutor(processes, context, start_worker, shared)

    def took(task: Done) -> None:
        done.append(task)
        keep(task)
        by_unit.setdefault(task.key[:2], {})[task.key[2]] = task

    try:
        # A file's pieces are known in the end only by reading it: asked again until there are none left.
        while _round(pool, tasks_left(units, by_unit), 2 * processes, took, lambda: look(read.value, tokens.value)):
            pass
    except BrokenProcessPool:
        raise worker_killed(workers) from None
    finally:
        stopping.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _round(
    pool: ProcessPoolExecutor, tasks: Iterable[Task], ahead: int, took: Callable[[Done], None], look: Callable[[], Any]
) -> bool:
    """Do tasks, ``ahead`` of them at a time. Returns whether there was one."""
    waiting: set[Future[Done]] = set()
    found = False
    coming = iter(tasks)
    while True:
        while len(waiting) < ahead and (task := next(coming, None)) is not None:
            waiting.add(pool.submit(do_task, task))
            found = True
        if not waiting:
            return found
        finished, waiting = wait(waiting, _LOOK_SECONDS, FIRST_COMPLETED)
        for future in finished:
            took(future.result())
        look()
