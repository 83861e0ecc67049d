"""What ``torch.cuda`` answers where the device is one of straw: eight Hopper GPUs, the current one by thread."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import types
from collections.abc import Callable

import torch
from torch._subclasses import fake_tensor

from dsv3_megatron.precision.kernels import available
from testing.straw.library import DEVICES
from testing.straw.record import Record

_HOPPER = types.SimpleNamespace(
    name="NVIDIA H800 of straw", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132
)


def pretend_cuda(library: ctypes.CDLL, record: Record) -> None:
    """Let torch say in this process that it is built with CUDA and has GPUs; count what waits for them."""
    library.straw_take_over()
    fake_tensor.init_gpu_context = lambda device: None  # where torch is built with CUDA it allocates memory
    for kind in ("flash", "mem_efficient", "cudnn"):  # a torch built with CUDA would ask the GPU what they can do
        getattr(torch.backends.cuda, f"enable_{kind}_sdp")(False)
    # Triton compiles for a real GPU: what its kernels compute is computed by torch here.
    available.why_not = lambda: "the GPU is one of straw"
    cuda = torch.cuda
    torch.version.cuda = "12.9"
    cuda.is_available, cuda.is_initialized = lambda: True, lambda: True
    cuda._lazy_init = lambda: None
    cuda.device_count = lambda: DEVICES

    def index_of(device: object) -> int:
        index = device if isinstance(device, int) else torch.device(device).index
        if not isinstance(index, int) or not 0 <= index < DEVICES:
            raise RuntimeError(f"CUDA error: invalid device ordinal ({device})")
        return index

    def exchange(device: int) -> int:
        before = library.straw_get_device()
        if device >= 0:
            library.straw_set_device(index_of(device))
        return before

    # What torch.cuda itself calls for the current device.
    for name, function in (
        ("_cuda_getDevice", lambda: library.straw_get_device()),
        ("_cuda_setDevice", lambda index: library.straw_set_device(index_of(index))),
        ("_cuda_exchangeDevice", exchange),
        ("_cuda_maybeExchangeDevice", lambda index: exchange(index)),
    ):
        setattr(torch._C, name, function)
    cuda._exchange_device, cuda._maybe_exchange_device = exchange, lambda device: exchange(device)
    cuda.get_device_properties = lambda device=None: _HOPPER
    cuda.get_device_capability = lambda device=None: (_HOPPER.major, _HOPPER.minor)
    cuda.get_device_name = lambda device=None: _HOPPER.name
    cuda.is_bf16_supported = lambda *a, **k: True
    cuda.is_current_stream_capturing = lambda: False
    cuda.mem_get_info = lambda device=None: (_HOPPER.total_memory, _HOPPER.total_memory)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, _zero())
    cuda.memory_stats = lambda device=None: {}
    cuda.empty_cache, cuda.reset_peak_memory_stats = lambda: None, lambda device=None: None
    cuda.synchronize = lambda device=None: record.add("synchronize")
    cuda.default_generators = tuple(torch.Generator() for _ in range(DEVICES))
    cuda.nvtx = types.SimpleNamespace(
        range_push=lambda *a: None, range_pop=lambda *a: None, range=lambda *a: contextlib.nullcontext()
    )
    _pretend_streams(record)
    torch.Tensor.record_stream = lambda tensor, stream: None


def _pretend_streams(record: Record) -> None:
    cuda = torch.cuda

    class Event:
        """A CUDA event."""

        def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False):
            self._timed, self._recorded = enable_timing, False

        def record(self, stream: object = None) -> None:
            self._recorded = True

        def wait(self, stream: object = None) -> None:
            """Let a stream wait: costs the host nothing."""

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            record.add("event.synchronize")

        def elapsed_time(self, other: Event) -> float:
            if not (self._timed and other._timed and self._recorded and other._recorded):
                raise RuntimeError("Both events must be created with enable_timing, and recorded")
            return 1.0

    class Stream:
        """A CUDA stream of the device current when it was made."""

        def __init__(self, device: object = None, priority: int = 0, **kwargs: object):
            index = cuda.current_device() if device is None else torch.device(device).index
            self.device, self.priority = torch.device("cuda", index), priority
            self.device_index, self.stream_id, self.cuda_stream = index, id(self), id(self)

        def wait_event(self, event: Event) -> None:
            """Costs the host nothing."""

        def wait_stream(self, stream: Stream) -> None:
            """Costs the host nothing."""

        def record_event(self, event: Event | None = None) -> Event:
            event = event or Event()
            event.record(self)
            return event

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            record.add("stream.synchronize")

    class Current:
        """``with torch.cuda.stream(s)``."""

        def __init__(self, stream: Stream | None):
            self._stream = stream

        def __enter__(self) -> None:
            self._before = getattr(_thread, "stream", None)
            if self._stream is not None:
                _thread.stream = self._stream

        def __exit__(self, *error: object) -> None:
            _thread.stream = self._before

    default = {index: Stream(torch.device("cuda", index)) for index in range(DEVICES)}

    def default_stream(device: object = None) -> Stream:
        return default[cuda.current_device() if device is None else torch.device(device).index]

    def set_stream(stream: Stream) -> None:
        _thread.stream = stream

    cuda.Event, cuda.Stream, cuda.stream, cuda.StreamContext = Event, Stream, Current, Current
    cuda.default_stream, cuda.set_stream = default_stream, set_stream
    cuda.current_stream = lambda device=None: getattr(_thread, "stream", None) or default_stream(device)


_thread = threading.local()


def _zero() -> Callable[..., int]:
    return lambda device=None: 0
