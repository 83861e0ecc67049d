"""A GPU's streams, events and memory rules over CPU tensors: what an operation must not do is an error here.

Operations compute at once, in the host's order. What is asynchronous on a GPU is imitated in two ways: messages arrive
late (testing.nccl.process_group), and the order that streams and events do or do not give is followed by vector clocks,
those of torch's own sanitizer of CUDA streams. An operation that reads or writes a tensor must be ordered after the
write, and the reads, of other streams; a block of memory goes back to the stream that allocated it, and is reused there
at once, unless ``record_stream`` was called for the others (torch's caching allocator).
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.cuda._sanitizer as sanitizer
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class RaceError(AssertionError):
    """An operation that a GPU could run too early, or in memory that another still uses."""


class StuckError(AssertionError):
    """A host that waits for ever."""


class Stream:
    """What ``torch.cuda.Stream`` makes: an order of its own."""

    _ids = itertools.count(1)

    def __init__(self, device: object = None, priority: int = 0, name: str | None = None, number: int | None = None):
        self.cuda_stream = next(Stream._ids) if number is None else number
        self.name = name or f"stream {self.cuda_stream}"
        self.priority = priority

    def __repr__(self) -> str:
        return self.name

    def record_event(self, event: Event | None = None) -> Event:
        """Return an event that is over when all that this stream has been given is."""
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        """Run nothing more before the event is over."""
        event.wait(self)

    def wait_stream(self, stream: Stream) -> None:
        """Run nothing more before the other stream has done all it has been given."""
        self.wait_event(stream.record_event())

    def synchronize(self) -> None:
        """Let the host wait for the stream."""
        self.record_event().synchronize()

    def query(self) -> bool:
        """Return whether the stream has nothing left to do."""
        return self.record_event().query()


class Event:
    """What ``torch.cuda.Event`` makes."""

    _ids = itertools.count(1)
    alive = 0

    def __init__(self, *args: object, **kwargs: object):
        self._id = next(Event._ids)
        Event.alive += 1

    def __del__(self) -> None:
        Event.alive -= 1

    def record(self, stream: Stream | None = None) -> None:
        """Be over when all that the stream has been given until now is."""
        gpu = Gpu.current
        with gpu.lock:
            gpu.handler.syncs.recorded_sync_states[self._id] = dict(gpu.clock(stream or gpu.stream))

    def wait(self, stream: Stream | None = None) -> None:
        """Let a stream (the current one) run nothing more before this is over."""
        gpu = Gpu.current
        with gpu.lock:
            if self._id in gpu.handler.syncs.recorded_sync_states:  # CUDA takes one never recorded for over
                gpu.handler.syncs.stream_wait_for_event((stream or gpu.stream).cuda_stream, self._id)

    def query(self) -> bool:
        """Return whether it is over; False as long as a message that comes before it has not arrived."""
        return not self._pending()

    def synchronize(self) -> None:
        """Let the host wait for it."""
        gpu = Gpu.current
        for operation in self._pending():
            gpu.await_arrival(operation, "an event's end")
        with gpu.lock:
            gpu.handler._handle_event_synchronization(self._id)

    def elapsed_time(self, other: Event) -> float:
        """Return 0.0: nothing takes time here."""
        return 0.0

    def _pending(self) -> list[Any]:
        gpu = Gpu.current
        with gpu.lock:
            clock = gpu.handler.syncs.recorded_sync_states.get(self._id, {})
            return [o for o in gpu.under_way() if o.number <= clock.get(o.stream.cuda_stream, -1)]


class _Place(list):
    """Stands for the stack that the sanitizer takes at every kernel: where the host is, in a word."""

    def format(self) -> list[str]:
        return list(self)


class _Places:
    """Stands for the module ``traceback`` in the sanitizer, whose real stacks cost more than the kernels."""

    class StackSummary:
        """Makes them."""

        @staticmethod
        def extract(*args: object, **kwargs: object) -> _Place:
            return _Place([Gpu.current.place()])

    @staticmethod
    def walk_stack(frame: object) -> None:
        """Walk nothing."""


class _Arguments(sanitizer.ArgumentHandler):
    """Which memory an operation reads and writes: whole storages, or slices of those registered as sliced."""

    def __init__(self, gpu: Gpu):
        super().__init__()
        self._gpu = gpu
        self.tensor_aliases = defaultdict(list)

    def _handle_argument(
        self, value: Any, is_write: bool, metadata_only: bool, name: str | None = None, is_output: bool = False
    ) -> None:
        if not isinstance(value, Tensor) or value.device.type != "cpu" or (metadata_only and not is_write):
            return
        for key in self._gpu.keys(value):
            (self.dataptrs_written if is_write else self.dataptrs_read).add(key)
            if is_output:
                self.outputs.add(key)


class Gpu(TorchDispatchMode):
    """The device of one rank. Enter it, and every operation of this thread runs under its rules."""

    current: Gpu

    def __init__(self, rank: int, stuck_seconds: float = 10.0):
        super().__init__()
        self.rank, self.stuck_seconds = rank, stuck_seconds
        self.host = threading.get_ident()
        self.handler = sanitizer.EventHandler()
        self.lock = threading.RLock()
        self.default_stream = Stream(name="the default stream", number=sanitizer.DEFAULT_STREAM_ID)
        self.stream = self.default_stream
        self.doing: list[str] = []  # the actions and parts (NVTX ranges) the host is in
        self._streams: dict[int, str] = {}
        self._allocated_on: dict[int, int] = {}  # storage -> stream
        self._recorded: dict[int, set[int]] = defaultdict(set)
        self._alive: dict[int, weakref.ref] = {}
        self._freed: dict[int, list[tuple[str, sanitizer.Access]]] = defaultdict(list)  # by the stream of the block
        self._sliced: dict[int, dict[tuple[int, int], int]] = {}  # storage -> {(address, end) of a slice: its key}
        self._slice_keys = itertools.count(1)
        self._under_way: dict[int, list[Any]] = defaultdict(list)  # storage key -> operations on their way
        self.launches = 0
        Gpu.current = self

    # -- where ---------------------------------------------------------------------------------------------------------

    def place(self) -> str:
        """Return what the host is doing."""
        return " > ".join(self.doing) or "outside any action"

    @contextlib.contextmanager
    def doing_now(self, what: str) -> Iterator[None]:
        """Name what happens inside."""
        self.doing.append(what)
        try:
            yield
        finally:
            self.doing.pop()

    def name_of(self, stream: int) -> str:
        """Return a stream's name."""
        return self._streams.get(stream, f"stream {stream}" if stream else "the default stream")

    def clock(self, stream: Stream) -> dict[int, int]:
        """Return what a stream is ordered after."""
        self._streams.setdefault(stream.cuda_stream, stream.name)
        self.handler.syncs._ensure_stream_exists(stream.cuda_stream)
        return self.handler.syncs.current_sync_states[stream.cuda_stream]

    # -- memory --------------------------------------------------------------------------------------------------------

    def keys(self, tensor: Tensor) -> list[int]:
        """Return what stands for the tensor's memory: its storage, or the slices of a storage that are inside it."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if (slices := self._sliced.get(key)) is None:
            self._see(storage)
            return [key]
        start = tensor.data_ptr()
        region = (start, start + tensor.numel() * tensor.element_size())
        if region not in slices:
            with self.lock:
                slices[region] = self._inherited([k for other, k in slices.items() if _overlap(other, region)])
        return [k for other, k in slices.items() if _overlap(other, region) and not _is_part(region, other)]

    def _inherited(self, regions: list[int]) -> int:
        """Return a key for a part of memory not looked at before: what happened around it, happened to it."""
        key, accesses = -next(self._slice_keys), self.handler.tensors_accessed.accesses
        infos = [accesses[region] for region in regions if region in accesses]
        writes = [info.write for info in infos if info.write is not None]
        latest = max(writes, key=lambda access: access.seq_num, default=None)
        accesses[key] = sanitizer.TensorInfo(None, [read for info in infos for read in info.reads], latest)
        self._under_way[key] = [o for region in regions for o in self._under_way.get(region, ())]
        return key

    def slice_memory(self, tensor: Tensor) -> None:
        """Follow the slices of a storage apart: gradient buffers, which different streams fill in different places."""
        self._sliced[tensor.untyped_storage()._cdata] = {}

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        with self.lock:
            if key not in self._alive:
                self._alive[key] = weakref.ref(storage, lambda _, key=key: self._free(key, "let go"))
                self._allocated_on[key] = self.stream.cuda_stream

    def _free(self, key: int, how: str) -> None:
        """A block goes back to the stream that allocated it, at once, for all that it was not recorded for."""
        with self.lock:
            info = self.handler.tensors_accessed.accesses.pop(key, None)
            home, recorded = self._allocated_on.pop(key, 0), self._recorded.pop(key, set())
            self._alive.pop(key, None)
            for access in [*info.reads, info.write] if info else []:
                if access is not None and access.stream != home and access.stream not in recorded:
                    self._freed[home].append((how, access))

    def emptied(self, storage: torch.UntypedStorage) -> None:
        """A storage was resized to nothing: its block is free, although the tensor lives."""
        with self.lock:
            key = storage._cdata
            home = self._allocated_on.get(key)
            alive = self._alive.get(key)
            self._free(key, "emptied")
            if home is not None:
                self._allocated_on[key], self._alive[key] = home, alive

    def record_stream(self, tensor: Tensor, stream: Stream) -> None:
        """Keep the tensor's block, once free, until ``stream`` has done what it has been given by then."""
        self._see(tensor.untyped_storage())
        with self.lock:
            self._recorded[tensor.untyped_storage()._cdata].add(stream.cuda_stream)

    def _check_reuse(self, operator: str) -> None:
        """Check, where an operation gets memory on the current stream, that every block free there is out of use."""
        home = self.stream.cuda_stream
        for how, access in self._freed.pop(home, ()):
            if not self.handler.syncs.is_ordered_after(home, access.seq_num, access.stream):
                raise RaceError(
                    f"rank {self.rank}, {self.place()}: {operator} takes memory on {self.name_of(home)} that was "
                    f"{how} while {self.name_of(access.stream)} may still run {access.operator} on it "
                    f"({access.stack_trace[0]}); record_stream was not called"
                )

    # -- operations ----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Check one operation and run it."""
        kwargs = kwargs or {}
        factory = bool(sanitizer.FACTORY_FUNCTION_REGEX.match(func._schema.name))
        touched = _Arguments(self)
        touched.parse_inputs(func._schema, args, kwargs, is_factory=factory)
        for key in touched.dataptrs_read | touched.dataptrs_written:
            self.await_ordered(key, str(func))
        known = set(self._alive)
        outputs = func(*args, **kwargs)
        touched.parse_outputs(func._schema, outputs, is_factory=factory)
        made = [
            t.untyped_storage()._cdata
            for t in pytree.tree_leaves(outputs)
            if isinstance(t, Tensor) and t.device.type == "cpu"
        ]
        with self.lock:
            if any(key not in known and key not in self._sliced for key in made):
                self._check_reuse(str(func))
            self.launch(
                self.stream, touched.dataptrs_read - touched.dataptrs_written, touched.dataptrs_written, str(func)
            )
        return outputs

    def touch(self, tensor: Tensor, operator: str) -> None:
        """Read a tensor on the current stream and let the host wait for it."""
        keys = self.keys(tensor)
        for key in keys:
            self.await_ordered(key, operator)
        self.launch(self.stream, set(keys), set(), operator)

    def launch(self, stream: Stream, read: set[int], written: set[int], operator: str) -> int:
        """Let a stream run an operation; return its number. Raises RaceError where a GPU could run it too early."""
        with self.lock:
            self.launches += 1
            self.clock(stream)
            errors = self.handler._handle_kernel_launch(
                stream.cuda_stream, read, written, set(), operator, defaultdict(list)
            )
            if errors:
                now, before = errors[0].current_access, errors[0].previous_access
                raise RaceError(
                    f"rank {self.rank}, {now.stack_trace[0]}: {operator} on {stream.name} is {now.type} what "
                    f"{before.operator} on {self.name_of(before.stream)} ({before.stack_trace[0]}) is {before.type}, "
                    "and no event or wait orders the two"
                )
            return self.handler.seq_num

    # -- messages on their way -----------------------------------------------------------------------------------------

    def set_off(self, operation: Any, keys: list[int]) -> None:
        """Note an operation (with ``done``, ``stream`` and ``number``) that will write to some memory."""
        with self.lock:
            for key in keys:
                self._under_way[key].append(operation)

    def under_way(self) -> list[Any]:
        """Return the operations whose data have not arrived. One that failed is kept: its data never will."""
        with self.lock:
            arrived = [k for k, all_ in self._under_way.items() if all(o.done.is_set() and not o.error for o in all_)]
            for key in arrived:
                del self._under_way[key]
            return [o for operations in self._under_way.values() for o in operations if not o.done.is_set()]

    def await_ordered(self, key: int, operator: str) -> None:
        """Wait, as the stream would, for what is on its way into some memory; unordered reads find poison instead."""
        for operation in self._under_way.get(key, ()) if self._under_way else ():
            ordered = self.handler.syncs.is_ordered_after(
                self.stream.cuda_stream, operation.number, operation.stream.cuda_stream
            )
            if ordered:
                self.await_arrival(operation, operator)

    def await_arrival(self, operation: Any, what_for: str) -> None:
        """Let the host stand until an operation is over. Raises StuckError, which names it, after a while."""
        if not operation.done.wait(self.stuck_seconds):
            raise StuckError(f"rank {self.rank}, {self.place()}: {what_for} waits for ever for {operation.describe()}")
        operation.check()


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _is_part(one: tuple[int, int], whole: tuple[int, int]) -> bool:
    """Return whether a region lies in a larger one."""
    return one != whole and whole[0] <= one[0] and one[1] <= whole[1]


@contextlib.contextmanager
def streams_of(gpu: Gpu) -> Iterator[Gpu]:
    """Let torch.cuda's streams and events be those of ``gpu`` inside, and check every operation of this thread."""
    # megatron-core keeps its streams for good. Imported here, as adapt_host must have run before.
    from megatron.core.pipeline_parallel import utils as plan
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    cuda = torch.cuda
    resize = torch.UntypedStorage.resize_

    @contextlib.contextmanager
    def stream(stream: Stream | None) -> Iterator[None]:
        before = gpu.stream
        gpu.stream = stream or before
        try:
            yield
        finally:
            gpu.stream = before

    def resized(self: torch.UntypedStorage, size: int) -> object:
        if size == 0:
            gpu.emptied(self)
        return resize(self, size)

    def read_by_host(method: Callable) -> Callable:
        """A GPU's tensor is copied to the host in the current stream's order; a CPU's is read as it lies."""

        def read(self: Tensor, *args: object, **kwargs: object) -> object:
            if threading.get_ident() == gpu.host:  # the threads that carry messages are no part of the program
                gpu.touch(self, f"Tensor.{method.__name__}")
            return method(self, *args, **kwargs)

        return read

    class Nvtx:
        """Names the parts of the overlapped plan."""

        range_push = staticmethod(lambda name: gpu.doing.append(name))
        range_pop = staticmethod(lambda: gpu.doing.pop())
        range = staticmethod(lambda name, *a, **k: gpu.doing_now(name))

    replaced: list[tuple[object, str, object]] = [
        (cuda, "Stream", Stream),
        (cuda, "Event", Event),
        (cuda, "current_stream", lambda device=None: gpu.stream),
        (cuda, "default_stream", lambda device=None: gpu.default_stream),
        (cuda, "stream", stream),
        (cuda, "synchronize", lambda device=None: _synchronize(gpu)),
        (cuda, "nvtx", Nvtx),
        (Tensor, "record_stream", lambda self, stream: gpu.record_stream(self, stream)),
        (torch.UntypedStorage, "resize_", resized),
        (Tensor, "tolist", read_by_host(Tensor.tolist)),
        (Tensor, "numpy", read_by_host(Tensor.numpy)),
        (sanitizer, "traceback", _Places),
        (plan, "_COMP_STREAM", None),
        (plan, "_COMM_STREAM", None),
        (MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", None),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        with gpu:
            yield gpu
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _synchronize(gpu: Gpu) -> None:
    for operation in gpu.under_way():
        gpu.await_arrival(operation, "torch.cuda.synchronize")
    with gpu.lock:
        gpu.handler._handle_device_synchronization()
