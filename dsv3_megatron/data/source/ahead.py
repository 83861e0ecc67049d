"""Samples of the steps that follow, made while this step computes.

What a step reads is a function of its first sample number and their count, so a reader may work ahead on a guess of
what comes next: a guess that is wrong (a roll-back) costs the work, never the order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Generic, TypeVar

Request = TypeVar("Request", bound=Hashable)
Batches = TypeVar("Batches")


class ReadAhead(Generic[Request, Batches]):
    """One thread that reads what will be asked for.

    The thread is a daemon: a file system that hangs can keep neither the process nor its watchdog.
    """

    def __init__(self, read: Callable[[Request], Batches]):
        """``read`` is called for one request at a time, on the reading thread alone."""
        self._read = read
        self._known: dict[Request, Future[Batches]] = {}
        self._queue: SimpleQueue[tuple[Request, Future[Batches]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def take(self, request: Request, following: Iterable[Request] = ()) -> Batches:
        """Return what ``request`` reads, and begin to read what follows.

        Args:
            following: what will be asked for next, in this order. Whatever else was read ahead is forgotten.
        Raises: what reading ``request`` raised; of later requests not before they are asked for.
        """
        wanted = list(dict.fromkeys((request, *following)))
        for old in self._known.keys() - set(wanted):
            self._known.pop(old).cancel()
        for new in wanted:
            if new not in self._known:
                self._known[new] = Future()
                self._queue.put((new, self._known[new]))
        self._start()
        return self._known.pop(request).result()

    def close(self) -> None:
        """Stop reading; the request at hand is still read. Returns when the thread has ended. May be called twice."""
        for future in self._known.values():
            future.cancel()
        self._known.clear()
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="reading ahead", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            request, future = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._read(request))
            except BaseException as error:  # it is raised where the request is asked for
                future.set_exception(error)
