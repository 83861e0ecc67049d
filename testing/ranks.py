"""Runs a function on N ranks over gloo: ``results = run_ranks(4, worker, cases)``.

One launch runs many cases, because starting torch costs seconds. Ranks are forked from a server that has imported
everything once and has run no thread. The first failing rank's traceback is raised; no process is left behind.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from testing.fork_servers import forked_from

context = multiprocessing.get_context("forkserver")
PRELOAD, TE = "testing.preload", "testing.te.preload"


def run_ranks(
    world: int,
    worker: Callable[..., Any],
    cases: Sequence[Any],
    timeout_seconds: float = 300,
    preload: str = PRELOAD,
) -> list[list[Any]]:
    """Return ``worker(case)`` of every rank for every case: results[case][rank].

    ``timeout_seconds``: in which some rank must end some case. ``preload``: the module that the ranks' server imports;
    ``TE`` for ranks that have Transformer Engine.
    """
    queue = context.Queue()
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in cases]
    ports = [store.port for store in stores]
    ranks = [
        context.Process(target=_rank_main, args=(rank, world, worker, list(cases), ports, queue, preload))
        for rank in range(world)
    ]
    with forked_from(preload):
        for rank in ranks:
            rank.start()
    results: list[list[Any]] = [[None] * world for _ in cases]
    try:
        for _ in range(world * len(cases)):
            case, rank, failure, value = queue.get(timeout=timeout_seconds)
            if failure:
                raise AssertionError(f"rank {rank} of {world}, case {cases[case]}:\n{failure}")
            results[case][rank] = value
    finally:
        for rank in ranks:
            rank.join(timeout=5)
            if rank.is_alive():
                rank.kill()
    return results


def _rank_main(
    rank: int, world: int, worker: Callable, cases: list, ports: list[int], queue: Any, preload: str
) -> None:
    importlib.import_module(preload)  # a server says nothing when it could not
    import torch

    torch.set_num_threads(1)
    os.chdir(tempfile.gettempdir())
    for number, (case, port) in enumerate(zip(cases, ports)):
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the store of the process that has started the ranks
        gc.collect()  # process groups of the case before, with their threads, which would be frozen for good
        gc.freeze()  # a run that ends has thawed what testing/preload.py froze
        try:
            queue.put((number, rank, None, worker(case)))
            _leave_group()
        except BaseException:
            queue.put((number, rank, traceback.format_exc(), None))
            queue.close()
            queue.join_thread()
            os._exit(1)
    queue.close()
    queue.join_thread()


def _leave_group() -> None:
    """Leave the process group of a case in which all ranks met the same error: a run ends its process then."""
    import torch

    from parallel.groups import stop_processes

    if torch.distributed.is_initialized():
        stop_processes()
