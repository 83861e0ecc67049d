"""One rank's whole run: start, steps, evaluations, saves, by the project's trainer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses import fake_tensor

from testing.straw.gpu import Gpu
from testing.straw.record import Record
from testing.straw.schedule import cut
from testing.straw.world import straw_world


def run_rank(record: Record, rank: int, local_rank: int, world_size: int, words: list[str]) -> dict[str, Any]:
    """Train the recipe of ``words`` as one rank, in a process in which ``pretend_cuda`` has set ``record`` up.

    Return what was counted by part of the run, the actions of a step by kind, dtype and shape of messages, and the
    dtypes of gradient buffers.
    """
    record.counts.clear()
    from launcher.command_line.compose import compose, resolved_yaml
    from parallel.world import World

    recipe, world = compose(words), World(rank, world_size, local_rank)
    device = _prepare(recipe, world)
    from dsv3_megatron.train import run, trainer
    from launcher.command_line.console import SilentReporter

    rows, pp_rank = recipe.data.sequence_length * recipe.optim.micro_batch, _pipeline_rank(recipe, world)
    gpu = Gpu(device, record, rows * recipe.model.num_experts_per_tok)
    found: dict[str, Any] = {"facts": {}, "actions": {}, "main_grads": Counter()}

    class Reporter(SilentReporter):
        """Keeps what the start says."""

        def start(self, facts: dict[str, str]) -> None:
            found["facts"] = facts

    with ExitStack() as stack:
        stack.enter_context(straw_world(world, device))
        stack.enter_context(_named_parts(trainer, record))
        stack.enter_context(_few_microbatches(pp_rank, found["actions"]))
        stack.enter_context(_seen_gradients(trainer, found["main_grads"]))
        stack.enter_context(_fake_storages())
        stack.enter_context(_matrices_of_others(recipe, world))
        stack.enter_context(gpu)
        summary = run.run(recipe, world, Reporter(), resolved_yaml(recipe))
    counts: dict[str, dict[str, int]] = {}
    for (part, kind, where), count in sorted(record.counts.items()):
        counts.setdefault(part, {})[f"{kind}: {where}"] = count
    return {"counts": counts, "steps": summary["step"], "messages": sorted(gpu.messages), **found}


def _prepare(recipe: Any, world: Any) -> torch.device:
    """Do what launcher.pretrain does before it imports megatron-core; return the device."""
    from dsv3_megatron.megatron.cpu import _leave_functions_uncompiled
    from dsv3_megatron.megatron.host import choose_device
    from dsv3_megatron.precision.transformer_engine import prepare_environment

    prepare_environment(recipe.precision)
    _leave_functions_uncompiled()  # nothing computes: compiled functions are taken as they are written
    return choose_device(recipe.run.device, world)


def _pipeline_rank(recipe: Any, world: Any) -> int:
    return recipe.layout(world.size).coordinates(world.rank)["pp"]


@contextmanager
def _named_parts(trainer: Any, record: Record) -> Iterator[None]:
    """Name the parts of a run as they come."""
    from dsv3_megatron.checkpoint.save import Saver
    from dsv3_megatron.train.callbacks.evaluation import Evaluation
    from parallel.pipeline.engine import Engine

    taken = 0

    def step(self: Any) -> str:
        nonlocal taken
        taken += 1
        return f"step {taken}"

    def named(original: Callable, name: Callable[[Any], str]) -> Callable:
        @wraps(original)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            with record.during(name(self)):
                return original(self, *args, **kwargs)

        return call

    with ExitStack() as stack:
        for owner, method, name in (
            (trainer.Trainer, "step", step),
            (Evaluation, "evaluate", lambda _: "evaluation"),
            (Saver, "save", lambda _: "save"),
            (Saver, "save_finally", lambda _: "save"),
            (Engine, "run", lambda _: f"{record.part}, pipeline"),
        ):
            stack.enter_context(patch.object(owner, method, named(getattr(owner, method), name)))
        yield


@contextmanager
def _few_microbatches(pp_rank: int, actions: dict[str, dict[str, int]]) -> Iterator[None]:
    """Cut schedules to what matters on this rank; note the kinds of its actions."""
    from dsv3_megatron.pipeline import parts

    def cutting(make: Callable) -> Callable:
        def made(recipe: Any, microbatches: int) -> Any:
            left = cut(make(recipe, microbatches), pp_rank)
            actions[left.name] = dict(sorted(Counter(step.kind for step in left.ranks[pp_rank]).items()))
            return left

        return made

    with ExitStack() as stack:
        for name in ("schedule_of", "evaluation_schedule"):
            stack.enter_context(patch.object(parts, name, cutting(getattr(parts, name))))
        yield


@contextmanager
def _seen_gradients(trainer: Any, dtypes: Counter) -> Iterator[None]:
    """Note the dtypes of the gradient buffers that parameters have after a step."""
    train_step = trainer.train_step

    def seen(parts: Any, *args: Any, **kwargs: Any) -> Any:
        result = train_step(parts, *args, **kwargs)
        dtypes.clear()
        dtypes.update(str(p.main_grad.dtype) for chunk in parts.chunks.values() for p in chunk.parameters())
        return result

    with patch.object(trainer, "train_step", seen):
        yield


@contextmanager
def _matrices_of_others(recipe: Any, world: Any) -> Iterator[None]:
    """Let other ranks hold of Muon's matrices what the planner says of them: together they must be whole."""
    from dsv3_megatron.pipeline.split import layers_of_stages
    from dsv3_megatron.planning.update.holdings import group_of
    from dsv3_megatron.train import muon

    layout = recipe.layout(world.size)
    at = layout.coordinates(world.rank)

    def gathered(mine: Any, group: Any) -> list[Any]:
        shapes, held = mine
        experts = any(name.endswith("]") or "]." in name for name in shapes)
        every = group_of(recipe, layout, layers_of_stages(recipe), at["pp"], experts=experts, ep_rank=at["ep"])
        holdings = list(every.plan.holdings)
        assert sorted(holdings[group.rank()].boxes) == sorted(held.boxes), "the planner holds other boxes"
        holdings[group.rank()] = held
        return [(every.plan.shapes, holding) for holding in holdings]

    with patch.object(muon, "_gathered", gathered):
        yield


@contextmanager
def _fake_storages() -> Iterator[None]:
    """Let fake tensors have addresses of their own, and copies between their storages do nothing: there are no numbers
    to copy, and torch's fake tensors keep both storages alive for ever after it (2.13). Modules that are moved keep
    their parameters, as on a GPU: for fake tensors ``Module.to`` would swap them."""

    def set_data(mine: torch.Tensor, other: torch.Tensor) -> None:
        mine.data = other.data

    with (
        # TE asks it of weights held in FP8, of whose parts some are None: no workspace is made for fake ones.
        patch.object(fake_tensor, "is_fake", lambda x: True),
        patch.object(torch.utils, "swap_tensors", set_data),
        patch.object(fake_tensor.FakeTensor, "data_ptr", lambda x: x.untyped_storage()._cdata),
        patch.object(torch.UntypedStorage, "copy_", lambda storage, *source: storage),
    ):
        yield
