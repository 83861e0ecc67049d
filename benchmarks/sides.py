"""Sides of a comparison: each in processes of its own, started once, measured in turns.

A side is a function that builds something and returns what one step of it does. Its processes stay while the others are
measured and do nothing then, so turns can alternate without paying for start-up, and no side sees another's settings
(threads, patched modules, memory). On a machine whose speed changes, all sides meet the same changes.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from testing.ports import free_port

Step = Callable[[], Any]
_context = multiprocessing.get_context("spawn")


class Side:
    """Processes that take steps when asked to."""

    def __init__(self, build: Callable[..., Step], *arguments: Any, world: int = 1, threads: int = 2):
        """Start ``world`` ranks with so many threads each; ``build(*arguments)`` runs in each of them."""
        port = free_port()
        self._pipes, self._ranks = [], []
        for rank in range(world):
            mine, theirs = _context.Pipe()
            started = _context.Process(target=_serve, args=(theirs, rank, world, port, threads, build, arguments))
            started.start()
            self._pipes.append(mine)
            self._ranks.append(started)
        self.facts = self._answers()[0]

    def seconds(self, steps: int) -> float:
        """Return the wall time of so many steps, of the slowest rank."""
        for pipe in self._pipes:
            pipe.send(steps)
        return max(self._answers())

    def memory_bytes(self) -> int:
        """Return the largest resident memory of any rank so far."""
        for pipe in self._pipes:
            pipe.send("memory")
        return max(self._answers())

    def noted(self) -> list[Any]:
        """Return what the first rank's step has put into its list ``noted`` so far."""
        for pipe in self._pipes:
            pipe.send("noted")
        return self._answers()[0]

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.send(None)
        for rank in self._ranks:
            rank.join(30)

    def _answers(self) -> list[Any]:
        found = [pipe.recv() for pipe in self._pipes]
        if wrong := [answer for answer in found if isinstance(answer, Exception)]:
            raise RuntimeError(f"a side failed: {wrong[0]!r}")
        return found


def _serve(
    pipe: Connection, rank: int, world: int, port: int, threads: int, build: Callable[..., Step], arguments: tuple
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": str(threads)}
    import torch

    from dsv3_megatron.metrics.step_metrics import peak_memory_bytes

    torch.set_num_threads(threads)
    try:
        step = build(*arguments)
        pipe.send(getattr(step, "facts", {}))
        while (wanted := pipe.recv()) is not None:
            if wanted == "memory":
                pipe.send(peak_memory_bytes(torch.device("cpu")))
                continue
            if wanted == "noted":
                pipe.send(step.noted)
                continue
            start = time.perf_counter()
            for _ in range(wanted):
                step()
            pipe.send(time.perf_counter() - start)
    except Exception as error:
        pipe.send(error)
        raise


def in_turns(sides: dict[str, Side], repeats: int, steps: int | dict[str, int], warm_up: int = 2) -> dict[str, list]:
    """Return seconds a step of every side, ``repeats`` of them, in alternating order after a warm-up."""
    of = steps if isinstance(steps, dict) else dict.fromkeys(sides, steps)
    for side in sides.values():
        side.seconds(warm_up)
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats):
        order: Sequence[str] = list(sides) if turn % 2 == 0 else list(reversed(sides))
        for name in order:
            found[name].append(sides[name].seconds(of[name]) / of[name])
    return found
