"""Names the place of a hang: which action every rank is in, and what it waits for.

Each rank notes the action it is in. When none ends for a given time, a thread of that rank writes the place and the
Python stack to the store that the process group started with, and the first rank to notice prints what all have
written. A rank that wrote nothing is named too: it is dead, or not stuck.

What is no training - building a model, loading a checkpoint, waiting for one - is a phase with a limit of its own, as
long as such things take: a step is given up sooner.

On a GPU the host runs ahead: a message that never comes holds a stream, and the host only where it reads a number, in
most steps after the last action. So an event follows every message that an action waits for, and every action; the
oldest that is not over is where the GPU stands. Events are used again as soon as they are over.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from parallel.device import has_streams
from parallel.pipeline.actions import Step

_CPU = torch.device("cpu")
ABORTED = 70  # exit code of a process that ended itself: EX_SOFTWARE, so that a launcher sees a failure
COLLECTIVES = "TORCH_FR_DUMP_TEMP_FILE"  # environment variable, of torch: file of its flight recorder, less the rank
DUMP_SECONDS = 20.0  # for the flight recorder's file; then the process ends without it
TELL_SECONDS = 30.0  # so long before the end of a phase it is told, or a quarter of the phase if that is less


@dataclass(frozen=True)
class _Phase:
    """Something that is no step, when it began, and how long it may take."""

    name: str
    limit: float
    since: float

    @property
    def tells_after(self) -> float:
        return self.limit - min(TELL_SECONDS, self.limit / 4)


class Watchdog:
    """Watches one rank. ``begin`` and ``end`` cost a clock reading; the thread wakes a few times per timeout."""

    def __init__(
        self,
        timeout_seconds: float,
        *,
        rank: int,
        world_size: int,
        store: dist.Store,
        report: Callable[[str], None] | None = None,
        abort_seconds: float | None = None,
        device: torch.device = _CPU,
    ):
        """Watch this process from now on.

        Args:
            timeout_seconds: how long one action may take before it is told; > 0.
            store: shared by all ranks; used only when something hangs.
            report: gets the text, on the first rank that notices; stderr by default.
            abort_seconds: end the process when one action takes longer than this, after writing the stacks of all its
                threads to stderr; what started it starts it anew. More than ``timeout_seconds``; None = never.
            device: where actions run.
        """
        self._timeout, self._rank, self._world_size = timeout_seconds, rank, world_size
        self._store = store
        self._report = report or (lambda text: print(text, file=sys.stderr, flush=True))
        self._abort = abort_seconds
        self._main = threading.get_ident()
        self._since: float | None = None  # None = nothing is under way
        self._place = ""
        self._waits_for = ""
        self._told = False
        self._phase: _Phase | None = None  # None = training
        self._steps = 0
        self._launches = _Launches() if has_streams(device) else None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def begin(self, position: int, count: int, step: Step) -> None:
        """An action begins."""
        if position == 0:
            self._steps += 1
        stages = ", ".join(f"stage {p.stage} microbatch {p.microbatch}" for p in step.parts)
        self._place = f"action {position + 1} of {count}: {step} ({stages})"
        self._waits_for, self._since = "", time.monotonic()

    def enter(self, place: str) -> None:
        """Something that is no action of a schedule begins, such as the optimizer's part of a step."""
        self._place, self._waits_for, self._since = place, "", time.monotonic()

    def leave(self) -> None:
        """It is over, and nothing is under way."""
        self._since = None

    @contextmanager
    def phase(self, name: str, limit_seconds: float) -> Iterator[None]:
        """What the block does is no training: told shortly before it has taken this long, and ended then."""
        self._phase = _Phase(name, limit_seconds, time.monotonic())
        try:
            yield
        finally:
            self._phase, self._since = None, None

    def waits(self, for_what: str) -> None:
        """The action waits for another rank."""
        self._waits_for = f", waits for the {for_what}"

    def runs(self) -> None:
        """What the action waited for is here, or the current stream waits for it."""
        if self._launches is not None:
            self._launches.add(f"{self._place}{self._waits_for}")
        self._waits_for = ""

    def launched(self) -> None:
        """All that the action does is done, or has been given to the current stream."""
        if self._launches is not None:
            self._launches.add(self._place)

    def end(self) -> None:
        """The last action of a step is over."""
        self._since = None

    def close(self) -> None:
        """Stop watching."""
        self._closing.set()
        self._thread.join(timeout=5)

    def _watch(self) -> None:
        pause = min(self._timeout, self._abort or self._timeout) / 4
        while not self._closing.wait(min(pause, 1.0)):
            phase = self._phase  # the other thread may leave it meanwhile
            seconds, tell, end = self._under_way(phase)
            pause = tell / 4
            if seconds <= tell:
                self._told = False
            elif not self._told:
                self._told = True
                # The others notice about now; their ends, and so this process's, may come soon after.
                self._tell(phase, seconds, wait=min(tell, 5.0, (end - tell) / 2 if end else 5.0))
            if end and seconds > end:
                self._end_process(phase, end)

    def _under_way(self, phase: _Phase | None) -> tuple[float, float, float | None]:
        """Return for how long something has been under way, when to tell of it, and when to end it if ever."""
        now, since = time.monotonic(), self._since
        if phase is not None:
            return now - phase.since, phase.tells_after, phase.limit
        standing = self._launches.oldest() if self._launches is not None else None
        if standing is not None:  # then the host waits, in one place for most of a step, and only the GPU moves
            since = standing[1]
        elif since is not None and self._launches is not None:
            since = max(since, self._launches.moved_at)
        return 0.0 if since is None else now - since, self._timeout, self._abort

    def _end_process(self, phase: _Phase | None, seconds: float) -> NoReturn:
        faulthandler.dump_traceback(sys.stderr)
        text = f"hang: rank {self._rank} ends itself after {seconds:g} s in {self._where(phase)}"
        print(text, file=sys.stderr, flush=True)
        keep_collectives(self._rank)
        os._exit(ABORTED)

    def _where(self, phase: _Phase | None) -> str:
        """Return where the host is, and where the GPU is if that is behind."""
        nothing = "nothing that is watched" if phase is None else ""
        host = f"{self._place}{self._waits_for}" if self._since is not None else nothing
        if phase is not None:
            host = f"{phase.name}: {host}" if host else phase.name
        standing = self._launches.oldest() if self._launches is not None else None
        return host if standing is None else f"{standing[0]}, on the GPU, while the host is in {host}"

    def _tell(self, phase: _Phase | None, seconds: float, wait: float) -> None:
        frame = sys._current_frames().get(self._main)
        where = traceback.extract_stack(frame)[-1] if frame else None
        stack = f" [{where.filename.rsplit('/', 1)[-1]}:{where.lineno} {where.name}]" if where else ""
        key = f"watchdog/{self._steps}"  # all ranks of a hang are in the same step, if not in the same phase
        self._store.set(f"{key}/{self._rank}", f"{self._where(phase)}, for {seconds:.0f} s{stack}")
        if self._store.add(f"{key}/{phase.name if phase else 'training'}/told", 1) > 1:
            return
        self._closing.wait(wait)
        lines = [f"hang: no action ended for {self._timeout:g} s of training; where each rank is:"]
        if phase is not None:
            lines = [f"hang: {phase.name} is not over after {seconds:.0f} s; where each rank is:"]
        for rank in range(self._world_size):
            place = self._store.get(f"{key}/{rank}").decode() if self._store.check([f"{key}/{rank}"]) else None
            lines.append(f"  rank {rank}: {place or 'has not said: not stuck, or dead'}")
        self._report("\n".join(lines))


class NoWatchdog:
    """Watches nothing: what the engine calls where nobody asked for a watchdog."""

    def _nothing(self, *what: object) -> None:
        pass

    begin = enter = leave = waits = runs = launched = end = close = _nothing

    @contextmanager
    def phase(self, name: str, limit_seconds: float) -> Iterator[None]:
        """Run the block."""
        yield


class _Launches:
    """What the host has given to the GPU and is not over, in order, as events that another thread may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: deque[tuple[str, torch.cuda.Event]] = deque()
        self._free: list[torch.cuda.Event] = []
        self._since = 0.0  # when what was before the oldest was over, as far as anybody asked

    @property
    def moved_at(self) -> float:
        """When the GPU last ended something, or began after a pause."""
        return self._since

    def add(self, what: str) -> None:
        """Note that the current stream does ``what`` after all it was given before."""
        with self._lock:
            self._forget_what_is_over()
            event = self._free.pop() if self._free else torch.cuda.Event()
            event.record()
            if not self._under_way:
                self._since = time.monotonic()
            self._under_way.append((what, event))

    def oldest(self) -> tuple[str, float] | None:
        """Return what the GPU does now and since when, or None if it has nothing left to do."""
        with self._lock:
            self._forget_what_is_over()
            return (self._under_way[0][0], self._since) if self._under_way else None

    def _forget_what_is_over(self) -> None:
        while self._under_way and _is_over(self._under_way[0][1]):
            self._free.append(self._under_way.popleft()[1])
            self._since = time.monotonic()


def _is_over(event: torch.cuda.Event) -> bool:
    try:
        return event.query()
    except RuntimeError:  # the device has failed: the host hears of it where it asks, and this thread must live to tell
        return False


def keep_collectives(rank: int) -> None:
    """Write what torch's flight recorder holds, the last collectives of this rank, where torch itself writes it when
    one of them times out, which is later than this process lives. Nothing where nobody has named a place.

    The process is about to end, and does: also when the dump hangs, or fails, which is told.
    """
    if not (place := os.environ.get(COLLECTIVES)):
        return
    faulthandler.dump_traceback_later(DUMP_SECONDS, exit=True)
    path = Path(f"{place}{rank}")
    try:
        from torch._C import _distributed_c10d as c10d  # torch has no public name for it (2.13)

        content = getattr(c10d, "_dump_nccl_trace" if dist.is_nccl_available() else "_dump_fr_trace")()
        path.unlink(missing_ok=True)  # which may be a link to something else
        with path.open("xb") as file:
            file.write(content)
    except (OSError, RuntimeError, AttributeError, ImportError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        print(f"hang: {path} cannot be written ({why})", file=sys.stderr, flush=True)
    faulthandler.cancel_dump_traceback_later()


def process_group_store() -> dist.Store:
    """Return a connection of its own to the store of the default process group, safe to use from another thread."""
    from torch.distributed.distributed_c10d import _get_default_store  # torch has no public name for it

    store = _get_default_store()
    try:
        return store.clone()  # type: ignore[attr-defined]  # torch 2.13's stubs leave it out
    except (RuntimeError, NotImplementedError):  # a store inside this process needs no second connection
        return store
