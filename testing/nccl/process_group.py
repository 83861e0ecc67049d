"""A process group over gloo that keeps NCCL's manners (torch 2.13, no ``device_id``).

- Two ranks that exchange ungrouped messages have a communicator of their own. Its first message, and the first one in
  each direction, hold the host until the other rank posts it too; so does a group's first collective.
- Operations of a communicator run in the order posted, one after the other, both directions in one queue.
- ``wait()`` returns at once: the current stream waits. What is received is not there yet; it is poison.
- Buffers are read and written until the operation is done, whatever the host does meanwhile.
- Collectives that are not asynchronous run on the current stream (torch >= 2.8).
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from queue import SimpleQueue
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions
from torch.utils._python_dispatch import _disable_current_modes

from testing.nccl.device import Gpu, Stream, StuckError

BACKEND = "manners"


class WrongMessageError(AssertionError):
    """Two ends of a pair that mean different messages."""


def _exchange(gloo: dist.ProcessGroupGloo, end: int, tag: int, mine: tuple) -> tuple:
    """Return what the other end says of its message, in exchange for what this one says."""
    text = json.dumps(mine).encode().ljust(200)
    header, theirs = torch.tensor(list(text), dtype=torch.uint8), torch.empty(200, dtype=torch.uint8)
    sent = gloo.send([header], end, tag)
    gloo.recv([theirs], end, tag).wait()
    sent.wait()
    return tuple(json.loads(bytes(theirs.tolist())))


class Operation:
    """One send, receive or collective from its posting to its end."""

    def __init__(self, what: str, place: str, run: Callable[[], None], stream: Stream, held: list[Tensor]):
        self.what, self.place, self.run, self.stream, self.held = what, place, run, stream, held
        self.number = 0
        self.clock: dict[int, int] = {}  # what is over once it is
        self.after: list[Operation] = []  # what its stream waits for first
        self.done = threading.Event()
        self.error: BaseException | None = None

    def describe(self) -> str:
        """Return what it is and where it was posted."""
        return f"the {self.what}, posted in {self.place}"

    def check(self) -> None:
        """Raise what went wrong."""
        if self.error is not None:
            raise self.error


def _nothing() -> None:
    pass


class Communicator:
    """Runs operations one after the other, on a thread and a stream of its own."""

    def __init__(self, name: str, gpu: Gpu):
        self.name, self._gpu = name, gpu
        self.stream = Stream(name=f"the stream of {name}")
        self._queue: SimpleQueue[Operation | None] = SimpleQueue()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def post(self, operation: Operation) -> None:
        """Run an operation after those posted before it."""
        self._queue.put(operation)

    def close(self) -> None:
        """Run what is posted, and nothing more."""
        self._queue.put(None)
        self._thread.join(timeout=5)

    def _work(self) -> None:
        while (operation := self._queue.get()) is not None:
            try:
                if self._failed is not None:
                    raise StuckError(f"{operation.describe()} stands behind one that failed: {self._failed}")
                for before in operation.after:
                    before.done.wait()
                    before.check()
                operation.run()
            except RuntimeError as error:  # gloo's: the other end has left, or time is up
                text = f"rank {self._gpu.rank}: {operation.describe()}, came to no end: {str(error).splitlines()[0]}"
                self._failed = operation.error = StuckError(text)
            except BaseException as error:
                self._failed = operation.error = error
            operation.run, operation.held, operation.after = _nothing, [], []  # what it used is free
            operation.done.set()


class MannersWork(dist.Work):
    """A handle of an operation, as ProcessGroupNCCL gives it."""

    def __init__(self, operation: Operation, gpu: Gpu, held: list[Tensor]):
        super().__init__()
        self._operation, self._gpu = operation, gpu
        self._held = held  # ProcessGroupNCCL keeps what an asynchronous collective uses until it is waited for

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Let the current stream wait for the operation; the host goes on."""
        gpu, operation = self._gpu, self._operation
        with gpu.lock:
            clock = gpu.clock(gpu.stream)
            gpu.handler.syncs._state_wait_for_other(clock, operation.clock)
        self._held = []
        return True

    synchronize = wait

    def is_completed(self) -> bool:
        """Return whether the operation is over; never waits."""
        return self._operation.done.is_set()


class MannersGroup(dist.ProcessGroup):
    """A process group of NCCL's manners."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta, name: str, ranks: list[int]):
        super().__init__(rank, size)
        self._rank, self._name, self._ranks, self._timeout = rank, name, ranks, timeout
        self._store = dist.PrefixStore("manners", store)
        self._gloo = dist.ProcessGroupGloo(dist.PrefixStore("all", self._store), rank, size, timeout)
        self._gpu = Gpu.current
        self._communicators: dict[object, Communicator] = {}
        self._pairs: dict[tuple[int, int], dist.ProcessGroupGloo] = {}
        self._met: set[str] = set()
        self._counts: dict[tuple[int, int], int] = {}

    def getBackendName(self) -> str:
        """Return the name it is registered by."""
        return BACKEND

    def size(self) -> int:
        """Return the number of members."""
        return len(self._ranks)

    @property
    def group_name(self) -> str:
        """The name torch gave it."""
        return self._name

    def close(self) -> None:
        """End its threads."""
        for communicator in self._communicators.values():
            communicator.close()

    # -- hosts that wait for each other --------------------------------------------------------------------------------

    def _meet(self, place: str, members: list[int], what: str) -> None:
        """Hold the host until all members have come to ``place``, once."""
        if place in self._met:
            return
        self._met.add(place)
        gpu = self._gpu
        self._store.set(f"{place}/{self._rank}", "here")
        deadline = time.monotonic() + gpu.stuck_seconds
        missing = members
        while missing := [m for m in missing if not self._store.check([f"{place}/{m}"])]:
            if time.monotonic() > deadline:
                others = ", ".join(str(self._ranks[m]) for m in missing)
                raise StuckError(
                    f"rank {gpu.rank}, {gpu.place()}: the {what} is the first there, and its host waits for ever for "
                    f"rank {others} to come to it too"
                )
            time.sleep(0.001)

    def _communicator(self, key: object, name: str) -> Communicator:
        if key not in self._communicators:
            self._communicators[key] = Communicator(name, self._gpu)
        return self._communicators[key]

    # -- messages ------------------------------------------------------------------------------------------------------

    def send(self, tensors: list[Tensor], peer: int, tag: int = 0) -> MannersWork:
        """Send; the buffer is read until the work is done."""
        return self._message(tensors[0], peer, sends=True)

    def recv(self, tensors: list[Tensor], peer: int, tag: int = 0) -> MannersWork:
        """Receive; the buffer is poison until the work is done."""
        return self._message(tensors[0], peer, sends=False)

    def _message(self, tensor: Tensor, peer: int, *, sends: bool) -> MannersWork:
        low, high = sorted((self._rank, peer))
        other = self._ranks[peer]
        what = f"{'send to' if sends else 'receive from'} rank {other}"
        label = message_label.get()
        what = f"{what} of the {label}" if label else what
        source, target = (self._rank, peer) if sends else (peer, self._rank)
        self._meet(f"pair {low} {high} from {source} to {target}", [low, high], what)
        if (low, high) not in self._pairs:
            store = dist.PrefixStore(f"pair {low} {high}", self._store)
            self._pairs[low, high] = dist.ProcessGroupGloo(store, int(self._rank == high), 2, self._timeout)
        gloo, end = self._pairs[low, high], int(peer == high)
        number = self._counts[low, high] = self._counts.get((low, high), -1) + 1

        def run() -> None:
            mine = ("send" if sends else "receive", label, tensor.numel(), str(tensor.dtype))
            theirs = _exchange(gloo, end, 2 * number, mine)
            if theirs[0] == mine[0] or theirs[1:] != mine[1:]:
                raise WrongMessageError(
                    f"rank {self._gpu.rank}: {operation.describe()}, is number {number} of its queue with rank {other} "
                    f"({mine[2]} x {mine[3]}), for which that is the {theirs[0]} of the {theirs[1] or 'message'} "
                    f"({theirs[2]} x {theirs[3]}): NCCL would hang, or take one for the other"
                )
            (gloo.send if sends else gloo.recv)([tensor], end, 2 * number + 1).wait()

        communicator = self._communicator(("pair", low, high), f"ranks {self._ranks[low]} and {self._ranks[high]}")
        operation = Operation(what, self._gpu.place(), run, communicator.stream, [tensor])
        # ProcessGroupNCCL records messages for the communicator's stream.
        self._gpu.record_stream(tensor, communicator.stream)
        read, written = ([tensor], []) if sends else ([], [tensor])
        self._launch(operation, communicator, read, written, own_stream=True)
        communicator.post(operation)
        return MannersWork(operation, self._gpu, [])

    # -- collectives ---------------------------------------------------------------------------------------------------

    def _collective(
        self,
        name: str,
        read: list[Tensor],
        written: list[Tensor],
        run: Callable[[], Any],
        *,
        asynchronous: bool,
    ) -> MannersWork:
        gpu = self._gpu
        what = f"{name} of ranks {self._ranks}"
        self._meet("collectives", list(range(self.size())), what)
        communicator = self._communicator("all", f"group {self._ranks}")
        stream = communicator.stream if asynchronous else gpu.stream
        with _disable_current_modes():
            operation = Operation(what, gpu.place(), lambda: run().wait(), stream, [*read, *written])
        self._launch(operation, communicator, read, written, own_stream=asynchronous)
        communicator.post(operation)
        if not asynchronous:
            gpu.await_arrival(operation, f"the {what}")
        return MannersWork(operation, gpu, [*read, *written] if asynchronous else [])

    def _launch(
        self,
        operation: Operation,
        communicator: Communicator,
        read: list[Tensor],
        written: list[Tensor],
        *,
        own_stream: bool,
    ) -> None:
        gpu, stream = self._gpu, operation.stream
        keys = [{key for tensor in of for key in gpu.keys(tensor)} for of in (read, written)]
        # What it uses may be on its way itself: the stream would wait, or the launch below is a race.
        for key in keys[0] | keys[1]:
            gpu.await_ordered(key, operation.what)
        with gpu.lock, _disable_current_modes():
            if own_stream:  # it begins when the current stream has come here
                gpu.handler.syncs._state_wait_for_other(gpu.clock(stream), gpu.clock(gpu.stream))
            clock = gpu.clock(stream)
            operation.after = [o for o in gpu.under_way() if o.number <= clock.get(o.stream.cuda_stream, -1)]
            operation.number = gpu.launch(stream, keys[0] - keys[1], keys[1], operation.what)
            operation.clock = dict(gpu.clock(stream))
            gpu.set_off(operation, [*keys[1]])
            memory_read = {tensor.untyped_storage()._cdata for tensor in read}
            if own_stream:
                for tensor in written:
                    if tensor.untyped_storage()._cdata not in memory_read:
                        tensor.fill_(float("nan") if tensor.is_floating_point() else 77)


# Under which names torch.distributed calls them before torch 2.13.
_NAMES_BEFORE = {
    "_allgather_base": "all_gather_single",
    "_reduce_scatter_base": "reduce_scatter_single",
    "alltoall_base": "all_to_all_single",
    "allgather_into_tensor_coalesced": "all_gather_single_coalesced",
    "reduce_scatter_tensor_coalesced": "reduce_scatter_single_coalesced",
}


def _collectives() -> None:
    """Give MannersGroup the collectives that torch.distributed calls: (name, of gloo, operands written, read)."""

    def flat(operands: Any) -> list[Tensor]:
        if isinstance(operands, Tensor):
            return [operands]
        return [tensor for operand in operands for tensor in flat(operand)]

    def define(name: str, gloo_name: str, written: list[int], read: list[int], many: int) -> None:
        def collective(self: MannersGroup, *args: Any, **kwargs: Any) -> MannersWork:
            opts = kwargs.get("opts", args[many] if len(args) > many else None)
            gloo = getattr(self._gloo, gloo_name)
            return self._collective(
                name,
                [t for i in read for t in flat(args[i])],
                [t for i in written for t in flat(args[i])],
                lambda: gloo(*args, **kwargs),
                asynchronous=bool(opts is not None and opts.asyncOp),
            )

        setattr(MannersGroup, name, collective)

    for name, gloo_name, written, read, many in (
        ("broadcast", "broadcast", [0], [0], 1),
        ("allreduce", "allreduce", [0], [0], 1),
        ("allreduce_coalesced", "allreduce_coalesced", [0], [0], 1),
        ("reduce", "reduce", [0], [0], 1),
        ("allgather", "allgather", [0], [1], 2),
        ("all_gather_single", "_allgather_base", [0], [1], 2),
        ("gather", "gather", [0], [1], 2),
        ("scatter", "scatter", [0], [1], 2),
        ("reduce_scatter", "reduce_scatter", [0], [1], 2),
        ("reduce_scatter_single", "_reduce_scatter_base", [0], [1], 2),
        ("all_to_all_single", "alltoall_base", [0], [1], 4),
        ("alltoall", "alltoall", [0], [1], 2),
    ):
        define(name, gloo_name, written, read, many)

    class Together:
        """Several works as one."""

        def __init__(self, works: list[Any]):
            self._works = works

        def wait(self) -> None:
            for work in self._works:
                work.wait()

    def coalesced(name: str, one: str) -> None:
        def collective(
            self: MannersGroup, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
        ) -> MannersWork:
            single, opts = getattr(self._gloo, one), opts or AllgatherOptions()  # torch 2.11 gives none
            return self._collective(
                name,
                inputs,
                outputs,
                lambda: Together([single(out, source, opts) for out, source in zip(outputs, inputs)]),
                asynchronous=bool(opts.asyncOp),
            )

        setattr(MannersGroup, name, collective)

    coalesced("all_gather_single_coalesced", "_allgather_base")
    coalesced("reduce_scatter_single_coalesced", "_reduce_scatter_base")

    def barrier(self: MannersGroup, opts: Any = None) -> MannersWork:
        nothing = torch.zeros(1)
        return self._collective("barrier", [nothing], [nothing], lambda: self._gloo.barrier(), asynchronous=False)

    MannersGroup.barrier = barrier
    for before, now in _NAMES_BEFORE.items():
        setattr(MannersGroup, before, getattr(MannersGroup, now))


_collectives()


class _Label(threading.local):
    """What the message being posted is, where a test says so."""

    def __init__(self) -> None:
        self._now = ""

    def get(self) -> str:
        return self._now

    @contextlib.contextmanager
    def set(self, label: str) -> Iterator[None]:
        before, self._now = self._now, label
        try:
            yield
        finally:
            self._now = before


message_label = _Label()
_groups: list[MannersGroup] = []


def _create(options: Any, backend_options: Any) -> MannersGroup:
    group = MannersGroup(
        options.store,
        options.group_rank,
        options.group_size,
        options.timeout,
        options.group_id,
        list(options.global_ranks_in_group) or list(range(options.group_size)),
    )
    _groups.append(group)
    return group


@contextlib.contextmanager
def manners() -> Iterator[None]:
    """Let process groups that would be gloo's keep NCCL's manners inside; groups asked for as gloo stay gloo's."""
    if BACKEND.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu"])
    start = dist.init_process_group

    def init_process_group(backend: str | None = None, **how: Any) -> None:
        start(BACKEND if backend == "gloo" else backend, **how)

    dist.init_process_group = init_process_group
    # Who waits for whom as ranks meet is told here (_meet); gloo beneath must not have an order of its own for it.
    connected = patch.dict(os.environ, TORCH_GLOO_LAZY_INIT="0")
    try:
        with connected:
            yield
    finally:
        dist.init_process_group = start
        while _groups:
            _groups.pop().close()
