"""What a microbatch holds on a stage, measured on fake tensors: kept between passes, and the peak inside each."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from dsv3_megatron.model.stage import is_routed_expert
from dsv3_megatron.planning.fake_stage import FakeStage, fake_stage, multiplies_in_fp8
from dsv3_megatron.precision.products import EmulatedFp8
from dsv3_megatron.recipe import Recipe
from parallel.actions import Action, Schedule
from parallel.layout import Layout


_MICROBATCHES = 3


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one stage on one rank. All but the parameter counts are above the level without this microbatch.

    ``kept`` lives from the forward to the last gradient; ``kept_owed`` from an input gradient to its weight gradient;
    ``held`` is there once, whatever the number of microbatches. The peaks are the most that is alive inside a pass,
    what is kept included.
    """

    parameters: int
    expert_parameters: int
    fp8_parameters: int
    kept: int
    held: int
    kept_owed: int
    peak_forward: int
    peak_backward: int
    peak_weight_grad: int
    message: int


def measure_stages(
    recipe: Recipe, layout: Layout, layers: tuple[int, ...], schedule: Schedule
) -> list[StageMemory]:
    """Return what every stage holds under the schedule; stages with the same layers are measured once."""
    kinds = {step.kind for steps in schedule.ranks for step in steps}
    planned, splits = "FB" in kinds, bool(kinds & {"I", "W"})
    dense, known, found, first = recipe.model.first_k_dense_replace, {}, [], 0
    for stage, count in enumerate(layers):
        of_dense = max(0, min(first + count, dense) - first)
        key = (stage == 0, stage == len(layers) - 1, of_dense, count)
        if key not in known:
            known[key] = measure_stage(recipe, layout, layers, stage, planned=planned, splits=splits)
        found.append(known[key])
        first += count
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
        measured = _whole_pass(fake, stage)
        if splits:
            measured |= _split_pass(fake, stage, measured["kept"])
        parameters = sum(p.numel() for p in fake.module.parameters())
        experts = sum(p.numel() for name, p in fake.module.named_parameters() if is_routed_expert(name))
        in_fp8 = sum(m.weight.numel() for m in fake.module.modules() if multiplies_in_fp8(m))
        return StageMemory(parameters, experts, in_fp8, message=fake.message_bytes, **measured)


def _begin(fake: FakeStage, *, planned: bool, splits: bool) -> None:
    kinds = ["FB"] if planned else ["I", "W"] if splits else ["F", "B"]
    steps = SimpleNamespace(ranks=[[SimpleNamespace(kind=kind) for kind in kinds]])
    step, EmulatedFp8.step = EmulatedFp8.step, EmulatedFp8.step
    fake.runner.begin(steps, [fake.batch] * _MICROBATCHES, training=True)
    EmulatedFp8.step = step  # weights have not changed: what is cached stays


def _forward(fake: FakeStage, stage: int, microbatch: int = 0, *, training: bool = True) -> None:
    activation = fake.runner.empty_message() if stage else None
    if training:
        fake.runner.run(Action("F", stage, microbatch), activation, _drop, None, None, _drop)
        return
    batch = fake.batch
    with torch.no_grad():
        if activation is not None:
            fake.module.set_input_tensor([activation])
        fake.module(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=batch["loss_mask"])


def _backward(fake: FakeStage, stage: int, microbatch: int, kind: str) -> None:
    gradient = None if fake.is_last else fake.runner.empty_message()
    fake.runner.run(None, None, _drop, Action(kind, stage, microbatch), gradient, _drop)


def _drop(tensor: torch.Tensor) -> None:
    """Hand a message to nobody."""


def _whole_pass(fake: FakeStage, stage: int) -> dict[str, int]:
    """Run two microbatches forward and one back. What the second adds is what each adds: modules hold on to a few
    tensors of the latest microbatch, once."""
    base = _settled(fake)
    _forward(fake, stage, 0)
    first = _settled(fake)
    _forward(fake, stage, 1)
    peak_forward = fake.memory.peak_bytes - first
    kept = _settled(fake) - first
    _backward(fake, stage, 0, "B")
    peak_backward = fake.memory.peak_bytes - first
    _clear_gradients(fake)
    return {
        "kept": kept,
        "held": max(0, first - base - kept),
        "peak_forward": peak_forward,
        "peak_backward": peak_backward,
        "kept_owed": 0,
        "peak_weight_grad": 0,
    }


def _split_pass(fake: FakeStage, stage: int, kept: int) -> dict[str, int]:
    """Run an input gradient (microbatch 1 is live) and, after another forward, its weight gradient."""
    others = _settled(fake) - kept
    _backward(fake, stage, 1, "I")
    _clear_gradients(fake)
    _forward(fake, stage, 2)
    owed = _settled(fake) - kept - others
    fake.runner.weight_gradient(Action("W", stage, 1))
    return {"kept_owed": owed, "peak_weight_grad": fake.memory.peak_bytes - kept - others}


def _clear_gradients(fake: FakeStage) -> None:
    """Drop gradients: in a run each is added to the gradient buffer as soon as it exists."""
    for parameter in fake.module.parameters():
        parameter.grad = None


def _settled(fake: FakeStage) -> int:
    """Return the bytes alive once garbage is gone, and look for peaks from here."""
    gc.collect()
    return fake.memory.restart_peak()
