"""What a microbatch holds on a stage, measured on fake tensors: kept between passes, and the peak inside each."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Literal

import torch

from dsv3_megatron.model.composition import composition, frozen_as_a_whole
from dsv3_megatron.model.stage import is_routed_expert
from dsv3_megatron.planning.memory.fake_stage import FakeStage, fake_stage
from dsv3_megatron.planning.memory.stage_memory import StageMemory
from dsv3_megatron.precision.products import Fp8Products
from dsv3_megatron.recipe import Recipe
from parallel.layout import Layout
from parallel.pipeline.actions import Action, Schedule
from parallel.pipeline.engine import Task

_MICROBATCHES = 5


def measure_stages(recipe: Recipe, layout: Layout, layers: tuple[int, ...], schedule: Schedule) -> list[StageMemory]:
    """Return what every stage holds under the schedule; stages with the same layers are measured once."""
    planned, splits = "FB" in schedule.kinds, bool(schedule.kinds & {"I", "W"})
    known: dict[tuple[bool, object, tuple[bool, ...]], StageMemory] = {}
    found = []
    for stage in range(len(layers)):
        layers_frozen = frozen_as_a_whole(recipe.model, layers, stage)
        key = (stage == 0, composition(recipe.model, layers, stage), layers_frozen)
        if key not in known:
            known[key] = measure_stage(recipe, layout, layers, stage, planned=planned, splits=splits)
        found.append(known[key])
    return found


def measure_stage(
    recipe: Recipe, layout: Layout, layers: tuple[int, ...], stage: int, *, planned: bool, splits: bool
) -> StageMemory:
    """Return what a stage holds under the recipe's recomputation, precision and micro batch.

    ``planned``: passes run through megatron-core's overlapped plan, as schedules with FB do; ``splits``: weight
    gradients are computed apart.
    """
    with fake_stage(recipe, layout, layers, stage) as fake:
        _begin(fake, planned=False, splits=False)
        _forward(fake, stage, training=False)  # once, so that what layers cache is not taken for activations
        _begin(fake, planned=planned, splits=splits)
        measured = _whole_pass(fake, stage, planned=planned)
        if splits:
            measured |= _split_pass(fake, stage, measured["kept"])
        parameters, experts = _counted(fake.module.named_parameters())
        frozen = _counted((name, p) for name, p in fake.module.named_parameters() if not p.requires_grad)
        in_fp8_layers = [m for m in fake.module.modules() if isinstance(getattr(m, "products", None), Fp8Products)]
        in_fp8 = sum(layer.get_parameter("weight").numel() for layer in in_fp8_layers)
        counted = {"frozen": frozen[0], "frozen_experts": frozen[1], "message": fake.message_bytes}
        return StageMemory(parameters, experts, in_fp8, **counted, **measured)


def _counted(parameters: Iterable[tuple[str, torch.Tensor]]) -> tuple[int, int]:
    """Return (all, those of routed experts) numbers of named parameters."""
    sizes = [(p.numel(), is_routed_expert(name)) for name, p in parameters]
    return sum(size for size, _ in sizes), sum(size for size, expert in sizes if expert)


def _begin(fake: FakeStage, *, planned: bool, splits: bool) -> None:
    kinds = {"FB"} if planned else {"I", "W"} if splits else {"F", "B"}
    step, Fp8Products.step = Fp8Products.step, Fp8Products.step
    fake.runner.begin(kinds, [fake.batch] * _MICROBATCHES, training=True)
    Fp8Products.step = step  # weights have not changed: what is cached stays


def _forward(fake: FakeStage, stage: int, microbatch: int = 0, *, training: bool = True) -> None:
    activation = fake.runner.empty_message() if stage else None
    if training:
        fake.runner.forward(Task(Action("F", stage, microbatch), activation, _drop))
        return
    batch = fake.batch
    with torch.no_grad():
        if activation is not None:
            fake.module.set_input_tensor([activation])
        fake.module(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=batch["loss_mask"])


def _backward(fake: FakeStage, stage: int, microbatch: int, kind: Literal["B", "I"]) -> None:
    gradient = None if fake.is_last else fake.runner.empty_message()
    fake.runner.backward(Task(Action(kind, stage, microbatch), gradient, _drop))


def _both(fake: FakeStage, stage: int, forward: int, backward: int) -> None:
    activation = fake.runner.empty_message() if stage else None
    gradient = None if fake.is_last else fake.runner.empty_message()
    f, b = Action("F", stage, forward), Action("B", stage, backward)
    fake.runner.forward_backward(Task(f, activation, _drop), Task(b, gradient, _drop))


def _drop(tensor: torch.Tensor) -> None:
    """Hand a message to nobody."""


def _whole_pass(fake: FakeStage, stage: int, *, planned: bool) -> dict[str, int]:
    """Run two microbatches forward and one back. What the second adds is what each adds: modules hold on to a few
    tensors of the latest microbatch, once."""
    base = _settled(fake)
    _forward(fake, stage, 0)
    first = _settled(fake)
    _forward(fake, stage, 1)
    peak_forward = fake.memory.peak_bytes - first
    kept = _settled(fake) - first
    if planned:  # its schedules run nearly every backward beside a forward, and are fullest there
        _both(fake, stage, 2, 0)
        peak_backward = fake.memory.peak_bytes - first - kept
    else:
        _backward(fake, stage, 0, "B")
        peak_backward = fake.memory.peak_bytes - first
    return {
        "kept": kept,
        "held": max(0, first - base - kept),
        "peak_forward": peak_forward,
        "peak_backward": peak_backward,
        "kept_deferred": 0,
        "peak_weight_grad": 0,
    }


def _split_pass(fake: FakeStage, stage: int, kept: int) -> dict[str, int]:
    """Run an input gradient (microbatch 1 is live, perhaps 2) and its weight gradient, after a forward each time: what
    modules hold on to of the latest pass is the same then."""
    _forward(fake, stage, 3)
    others = _settled(fake) - kept
    _backward(fake, stage, 1, "I")
    _forward(fake, stage, 4)
    deferred = _settled(fake) - kept - others
    fake.runner.weight_gradient(Action("W", stage, 1))
    return {"kept_deferred": deferred, "peak_weight_grad": fake.memory.peak_bytes - kept - others}


def _settled(fake: FakeStage) -> int:
    """Return the bytes alive once garbage is gone, and look for peaks from here."""
    gc.collect()
    return fake.memory.restart_peak()
