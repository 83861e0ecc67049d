"""What a rank of a test does to run over the stand-in, and how its engine names what it does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from dsv3_megatron.train import build
from parallel.pipeline import engine, watchdog
from testing.nccl.device import Gpu, streams_of
from testing.nccl.process_group import manners, message_label


@contextlib.contextmanager
def nccl_rank(rank: int, stuck_seconds: float = 10.0) -> Iterator[Gpu]:
    """Be rank ``rank`` on a GPU with NCCL inside: start processes in it as always, on the CPU."""
    gpu = Gpu(rank, stuck_seconds)
    with contextlib.ExitStack() as stack:
        for part in (_named_actions(gpu), _named_messages(), _sliced_buffers(gpu), _streams_everywhere(), manners()):
            stack.enter_context(part)
        yield stack.enter_context(streams_of(gpu))


@contextlib.contextmanager
def _named_actions(gpu: Gpu) -> Iterator[None]:
    execute = engine.Engine._execute

    def named(self: engine.Engine, step: Any) -> None:
        with gpu.doing_now(f"action {step}"):
            execute(self, step)

    engine.Engine._execute = named
    try:
        yield
    finally:
        engine.Engine._execute = execute


@contextlib.contextmanager
def _named_messages() -> Iterator[None]:
    post = engine._Channel._post

    def named(self: Any, messages: Iterator[Any], *made: Any) -> None:
        for message in messages:
            with message_label.set(str(message)):
                post(self, iter((message,)), *made)

    engine._Channel._post = named
    try:
        yield
    finally:
        engine._Channel._post = post


@contextlib.contextmanager
def _sliced_buffers(gpu: Gpu) -> Iterator[None]:
    """Follow the parameters and gradients that share one buffer apart."""
    wrap = build.wrap_for_reduction

    def sliced(*args: Any) -> Any:
        ddp = wrap(*args)
        for buffer in ddp.buffers + ddp.expert_parallel_buffers:
            for data in (buffer.grad_data, buffer.param_data):
                if data is not None:
                    gpu.slice_memory(data)
        return ddp

    build.wrap_for_reduction = sliced
    try:
        yield
    finally:
        build.wrap_for_reduction = wrap


@contextlib.contextmanager
def _streams_everywhere() -> Iterator[None]:
    """Let the code under test take the CPU for a device with streams."""
    modules = (engine, watchdog)
    before = [module.has_streams for module in modules]
    for module in modules:
        module.has_streams = lambda device: True
    try:
        yield
    finally:
        for module, function in zip(modules, before):
            module.has_streams = function
