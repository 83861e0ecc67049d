"""What megatron-core needs to run without CUDA.

megatron-core 0.16.1 assumes a CUDA device in some forty places. Each adaptation answers one such question from outside;
none changes a number. For each: why, and how one sees that it can go.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import types
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

CPU = torch.device("cpu")
_state = {"device": CPU}

# megatron-core is imported inside the functions: not before the process is prepared, and only where it is adapted.


def adapt_to_no_cuda() -> None:
    """Make megatron-core run where there is no CUDA device, or where none is to be used."""
    _leave_functions_uncompiled()
    _answer_cuda_questions()
    _answer_cuda_random_state()
    _redirect_cuda_factories()
    _redirect_cuda_moves()
    _fix_cpu_split_sizes()
    _exchange_unequal_shares_over_gloo()


@contextlib.contextmanager
def virtual_device(device: torch.device) -> Iterator[None]:
    """Let "the current CUDA device" be ``device`` inside: ``meta`` builds a true-size model without memory."""
    before = _state["device"]
    _state["device"] = device
    current = torch.cuda.current_device
    torch.cuda.current_device = _current_device
    try:
        with torch.device(device):
            yield
    finally:
        _state["device"] = before
        torch.cuda.current_device = current


def _current_device() -> torch.device:
    return _state["device"]


def _leave_functions_uncompiled() -> None:
    """Why: megatron decorates small functions with torch.compile at import, which costs 3 s of inductor import and
    some 6 s of C++ compilation in the first step on a CPU. Can go when megatron decorates lazily.

    torch's own optimizers and checkpointing ask torch._dynamo to look away, which imports it for a second; where
    nothing is compiled their functions stand for themselves (torch 2.11 to 2.13). Can go when
    test_a_run_compiles_nothing passes without it."""
    import torch.utils.checkpoint

    if "megatron.core" in sys.modules:  # imported before the CPU was chosen: what is decorated runs as it is written
        torch.compiler.set_stance("force_eager")

    torch.compile = lambda function=None, *a, **k: function if function is not None else (lambda inner: inner)
    for owner in (torch.optim.Optimizer, torch.utils.checkpoint):
        for function in vars(owner).values():
            if "_disable_dynamo" in getattr(getattr(function, "__code__", None), "co_qualname", ""):
                plain = function.__wrapped__
                setattr(plain, "__dynamo_disable", plain)


class _Event:
    """A CUDA event of a device that finishes everything at once."""

    def __init__(self, *args: object, **kwargs: object):
        pass

    def _nothing(self, *args: object) -> None:
        pass

    record = wait = synchronize = _nothing

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Event) -> float:
        return 0.0


class _Stream(torch.cpu.Stream):
    """The one stream of a device without streams."""

    def __new__(cls, *args: object, **kwargs: object) -> _Stream:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object):
        pass

    def _nothing(self, *args: object) -> None:
        pass

    wait_event = wait_stream = synchronize = _nothing

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def query(self) -> bool:
        return True


def _answer_cuda_questions() -> None:
    """Why: streams, events, device and memory queries are called without asking whether CUDA is there. Can go when a
    model trains on a CPU after commenting this out; the traceback names the first that cannot."""
    cuda, stream = torch.cuda, _Stream()

    def nothing() -> Callable[..., None]:
        return lambda *a, **k: None  # one function for each name: torch._dynamo refuses one that stands for two

    cuda.Event, cuda.Stream = _Event, _Stream
    cuda.current_stream = lambda device=None: stream
    cuda.default_stream = lambda device=None: stream
    cuda.stream = lambda s: contextlib.nullcontext()
    cuda.current_device = _current_device
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(cuda, name, nothing())
    cuda.device_count = lambda: 1
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda *a, **k: 0)
    cuda.memory_stats = lambda *a, **k: {}
    cuda.nvtx = types.SimpleNamespace(
        range_push=nothing(), range_pop=nothing(), range=lambda *a, **k: contextlib.nullcontext()
    )
    torch.Tensor.record_stream = lambda self, s: None


def _answer_cuda_random_state() -> None:
    """Why: the model-parallel random tracker stores and restores CUDA generators. Here the default CPU generator
    plays that part. Can go when megatron's tracker takes a device."""
    cuda, generator = torch.cuda, torch.random.default_generator
    cuda.manual_seed = lambda seed: generator.manual_seed(seed) and None
    cuda.manual_seed_all = lambda seed: generator.manual_seed(seed) and None
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *a, **k: generator.get_state()
        module.set_rng_state = lambda state, *a, **k: generator.set_state(state)
    import megatron.core.tensor_parallel.random as tracker

    tracker._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: generator.get_state()
    tracker._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: generator.set_state(state)
    # It warns when the CPU state changes under it, which is now its normal way of working.
    logging.getLogger(tracker.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _redirect_cuda_factories() -> None:
    """Why: ``device="cuda"`` and ``pin_memory=True`` stand as literals in schedules, clipping and the optimizer. Can go
    when megatron takes its device from a tensor. torch's own list of constructors is filled first: it must hold the
    originals, or ``with torch.device("meta")`` silently stops working."""
    import torch.utils._device

    torch.utils._device._device_constructors()

    def redirected(factory: Callable) -> Callable:
        @functools.wraps(factory)
        def make(*args: object, **kwargs: object) -> object:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = _current_device()
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return factory(*args, **kwargs)

        return make

    names = "tensor zeros ones empty full arange rand randn randint zeros_like ones_like empty_like full_like as_tensor"
    for name in names.split():
        setattr(torch, name, redirected(getattr(torch, name)))


def _redirect_cuda_moves() -> None:
    """Why: ``.cuda()``, ``.to("cuda")`` and ``.pin_memory()`` are called on tensors, and the optimizer recognises
    float32 by ``tensor.type() == "torch.cuda.FloatTensor"``. Can go with the entry above."""
    tensor = torch.Tensor
    tensor.pin_memory = lambda self, *a, **k: self
    tensor.cuda = lambda self, *a, **k: self
    torch.nn.Module.cuda = lambda self, *a, **k: self
    to, type_name = tensor.to, tensor.type

    def move(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (_current_device(), *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _current_device()
        return to(self, *args, **kwargs)

    def cuda_type(self: torch.Tensor, *args: object, **kwargs: object) -> object:
        name = type_name(self, *args, **kwargs)
        if args or kwargs or self.device.type != "cpu":
            return name
        return name.replace("torch.", "torch.cuda.", 1)

    tensor.to, tensor.type = move, cuda_type


def _fix_cpu_split_sizes() -> None:
    """Why: the all-to-all dispatcher turns split sizes into lists only when they are CUDA tensors, and
    ``all_to_all_single`` refuses tensors. Can go when maybe_move_tensor_to_cpu stops asking ``is_cuda``."""
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
    )


def _exchange_unequal_shares_over_gloo() -> None:
    """Why: with TP inside experts over EP, the ranks of a TP group hold different numbers of rows; NCCL gathers and
    reduce-scatters such, gloo refuses ("invalid tensor size"). Can go when test_schedules_equal_one_process.py passes
    without it."""
    import megatron.core.tensor_parallel.mappings as mappings

    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_along_first_dim(
        input_: torch.Tensor, group: dist.ProcessGroup, output_split_sizes: list[int] | None = None, *rest: object
    ) -> torch.Tensor:
        if output_split_sizes is None or len(set(output_split_sizes)) == 1:
            return gather(input_, group, output_split_sizes, *rest)
        longest = input_.new_zeros(max(output_split_sizes), *input_.shape[1:])
        longest[: len(input_)] = input_
        parts = [torch.empty_like(longest) for _ in output_split_sizes]
        dist.all_gather(parts, longest, group=group)
        return torch.cat([part[:rows] for part, rows in zip(parts, output_split_sizes)])

    def reduce_scatter_along_first_dim(
        input_: torch.Tensor, group: dist.ProcessGroup, input_split_sizes: list[int] | None = None, *rest: object
    ) -> torch.Tensor:
        if input_split_sizes is None or len(set(input_split_sizes)) == 1:
            return reduce_scatter(input_, group, input_split_sizes, *rest)
        total = input_.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total.split(input_split_sizes)[group.rank()].clone()

    mappings._gather_along_first_dim = gather_along_first_dim
    mappings._reduce_scatter_along_first_dim = reduce_scatter_along_first_dim
