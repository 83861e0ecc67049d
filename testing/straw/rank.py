"""One rank's whole run: start, steps, evaluations, saves, by the project's trainer."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses import fake_tensor

from testing.straw.cuda import pretend_cuda
from testing.straw.gpu import Gpu
from testing.straw.record import Record
from testing.straw.world import straw_world


def run_rank(library: ctypes.CDLL, rank: int, world_size: int, local_rank: int, words: list[str]) -> dict[str, Any]:
    """Train the recipe of ``words`` as one rank; return what was counted by part of the run, and facts."""
    record = Record()
    pretend_cuda(library, record)
    from dsv3_megatron.precision.transformer_engine import prepare_environment
    from launcher.compose import compose, resolved_yaml
    from parallel.world import World

    recipe, world = compose(words), World(rank, world_size, local_rank)
    prepare_environment(recipe.precision)
    from dsv3_megatron.host import _leave_functions_uncompiled, choose_device

    _leave_functions_uncompiled()
    device = choose_device(recipe.run.device, world)
    import dsv3_megatron.trainer as trainer
    from launcher.console import SilentReporter

    model, rows = recipe.model, recipe.data.sequence_length * recipe.optim.micro_batch
    gpu = Gpu(device, record, lambda shape: rows * model.num_experts_per_tok)
    seen: dict[str, Any] = {}
    with ExitStack() as stack:
        stack.enter_context(straw_world(world, device))
        stack.enter_context(_parts(trainer, record, seen))
        stack.enter_context(_fake_storages())
        stack.enter_context(gpu)
        summary = trainer.run(recipe, world, SilentReporter(), resolved_yaml(recipe))
    counts: dict[str, dict[str, int]] = {}
    for (part, kind, where), count in sorted(record.counts.items()):
        counts.setdefault(part, {})[f"{kind}: {where}"] = count
    return {"counts": counts, "step": summary["step"], "messages": sorted(gpu.messages), **seen}


@contextmanager
def _parts(trainer: Any, record: Record, seen: dict[str, Any]) -> Iterator[None]:
    """Name the parts of a run as they come."""
    from dsv3_megatron import step as steps
    from dsv3_megatron.checkpoint.save import Saver
    from parallel.engine import Engine

    taken = 0

    def step(original: Callable) -> Callable:
        def one(self: Any) -> None:
            nonlocal taken
            taken += 1
            with record.during(f"step {taken}"):
                original(self)

        return one

    def named(name: str) -> Callable:
        def around(original: Callable) -> Callable:
            def call(*args: Any, **kwargs: Any) -> Any:
                with record.during(name):
                    return original(*args, **kwargs)

            return call

        return around

    def pipeline(original: Callable) -> Callable:
        def run(self: Any) -> None:
            with record.during(f"{record.part}, pipeline"):
                original(self)

        return run

    with ExitStack() as stack:
        for owner, name, around in (
            (trainer.Trainer, "_one_step", step), (trainer.Trainer, "evaluate", named("evaluation")),
            (Saver, "save", named("save")), (Saver, "save_finally", named("save")), (Engine, "run", pipeline),
        ):  # fmt: skip
            stack.enter_context(patch.object(owner, name, around(getattr(owner, name))))
        yield
    del steps


@contextmanager
def _fake_storages() -> Iterator[None]:
    """Let fake tensors have addresses of their own, and copies between their storages do nothing: there are no numbers
    to copy, and torch's fake tensors keep both storages alive for ever after it (2.13). Modules that are moved keep
    their parameters, as on a GPU: for fake tensors ``Module.to`` would swap them."""

    def set_data(mine: torch.Tensor, other: torch.Tensor) -> None:
        mine.data = other.data

    with (
        patch.object(torch.utils, "swap_tensors", set_data),
        patch.object(fake_tensor.FakeTensor, "data_ptr", lambda x: x.untyped_storage()._cdata),
        patch.object(torch.UntypedStorage, "copy_", lambda storage, *source: storage),
    ):
        yield
