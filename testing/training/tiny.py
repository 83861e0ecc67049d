"""A small recipe, its batches, and one rank's training on it: what multi-process tests run."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_megatron.data.exclude import Exclusion
from dsv3_megatron.data.source.samples import Sample, Synthetic
from dsv3_megatron.model.initialise import _matrices, global_name
from dsv3_megatron.model.stage import is_routed_expert
from dsv3_megatron.optim.regime import Regime
from dsv3_megatron.pipeline.parts import Parts
from dsv3_megatron.recipe import Recipe
from dsv3_megatron.train.build import build_parts
from dsv3_megatron.train.data.batches import BatchReader
from dsv3_megatron.train.progress import Progress
from dsv3_megatron.train.step import StepResult, StepValues, train_step
from launcher.command_line.compose import compose
from parallel.groups import start_processes, stop_processes
from parallel.world import World

# Small enough for seconds, yet with every part; a balance weight and an initialisation at which each part of the loss
# moves every gradient far above rounding.
SMALL = (
    "model.hidden_size=64",
    "model.intermediate_size=96",
    "model.moe_intermediate_size=32",
    "model.num_attention_heads=4",
    "model.q_lora_rank=32",
    "model.kv_lora_rank=16",
    "model.qk_nope_head_dim=16",
    "model.qk_rope_head_dim=8",
    "model.v_head_dim=16",
    "model.n_routed_experts=8",
    "model.num_experts_per_tok=2",
    "model.topk_group=2",
    "model.vocab_size=256",
    "model.initializer_range=0.06",
    "optim.global_batch=8",
    "optim.micro_batch=2",
    "data=synthetic",
    "data.sequence_length=32",
    "logging.wandb=disabled",
    "logging.report_every_seconds=0",
)
VALUES = StepValues(learning_rate=1e-3, mtp_weight=0.3, bias_speed=0.001, balance_weight=0.02)


@dataclass
class Case:
    """One layout to train in."""

    overrides: tuple[str, ...] = ()
    steps: int = 3
    save_to: str | None = None  # where to write this run's gradients and weights
    reference: str | None = None  # where the one-process gradients lie, to compare with
    values: StepValues = field(default_factory=lambda: VALUES)
    samples: list[Sample] | None = None  # to train on; None = Synthetic ones


def small_recipe(*overrides: str) -> Recipe:
    """Return the small recipe with overrides."""
    return compose([*SMALL, *overrides])


def step_batches_of(parts: Parts, number: int = 0, source: Any = None) -> list[dict[str, Tensor]]:
    """Return this rank's microbatches of step ``number``, as the trainer reads them; of Synthetic samples where no
    ``source`` is given."""
    recipe = parts.recipe
    regime = Regime(recipe.optim, recipe.data.sequence_length)
    source = source or Synthetic(recipe.model.vocab_size, recipe.data.sequence_length, seed=5)
    reader = BatchReader(parts, reading(source), regime)
    tokens = regime.tokens_of_step(number)
    try:
        progress = Progress(step=number, tokens=tokens, samples=tokens // recipe.data.sequence_length)
        return reader.take(progress).microbatches
    finally:
        reader.close()


def reading(source: Any) -> Any:
    """Return what a reader of batches asks of a run's data: samples of ``source``, none of them excluded."""
    return SimpleNamespace(train=source, exclusion=Exclusion())


def train_rank(case: Case) -> dict[str, Any]:
    """Train on this rank; return losses, and how far gradients, weights and their changes are from the reference's."""
    recipe, world = small_recipe(*case.overrides), World.from_environment()
    start_processes(world, torch.device("cpu"), timeout_seconds=120)
    try:
        parts = build_parts(recipe, recipe.layout(world.size), torch.device("cpu"))
        source = SimpleNamespace(sample=case.samples.__getitem__) if case.samples is not None else None
        before = {k: v.clone() for k, v in named_weights(parts).items()}
        gradients: list[dict[str, Tensor]] = []
        results: list[StepResult] = []

        def keep_gradients(loss: float, norm: float) -> bool:
            gradients.append(whole_gradients(parts))
            return True

        for number in range(case.steps):
            batches = step_batches_of(parts, number, source)
            results.append(train_step(parts, batches, case.values, keep_gradients))
        weights = {k: v.clone() for k, v in named_weights(parts).items()}
        updates = {k: v - before[k] for k, v in weights.items()}
        biases = {
            f"bias.{global_name(k, parts.first_layer(stage))}": v.clone()
            for stage, chunk in parts.chunks.items()
            for k, v in chunk.named_buffers()
            if k.endswith("expert_bias")
        }
        found: dict[str, Any] = {"results": results}
        if case.save_to is not None:
            of_run = {"gradients": gradients, "weights": weights, "updates": updates, "biases": biases}
            torch.save(of_run, case.save_to)
        if case.reference is not None:
            reference = torch.load(case.reference)
            found["gradient_errors"] = [
                errors(parts, mine, whole) for mine, whole in zip(gradients, reference["gradients"])
            ]
            found["weight_errors"] = errors(parts, weights, reference["weights"])
            found["update_errors"] = errors(parts, updates, reference["updates"])
        return found
    finally:
        stop_processes()


def named_weights(parts: Parts) -> dict[str, Tensor]:
    """Return this rank's parameters by their names in the whole model."""
    return {key: p.detach() for key, p in named_parameters(parts).items()}


def named_parameters(parts: Parts) -> dict[str, torch.nn.Parameter]:
    """Return this rank's parameters, of all its stages, by their names in the whole model."""
    return {
        global_name(name, parts.first_layer(stage)): p
        for stage, chunk in parts.chunks.items()
        for name, p in chunk.named_parameters()
    }


def whole_gradients(parts: Parts) -> dict[str, Tensor]:
    """Return this rank's reduced gradients by name: ZeRO-1 leaves each rank a shard, so shards are gathered. What is
    frozen has none."""
    for buffer in (b for ddp in parts.ddps.values() for b in ddp.buffers + ddp.expert_parallel_buffers):
        for bucket in buffer.buckets:
            group = buffer.data_parallel_group
            shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)
    return {key: p.main_grad.clone() for key, p in named_parameters(parts).items() if p.requires_grad}


def errors(parts: Parts, mine: dict[str, Tensor], whole: dict[str, Tensor]) -> dict[str, float]:
    """Return, by name, the norm of the difference from this rank's share of the whole, relative to the share's."""
    found = {}
    parameters = named_parameters(parts)
    for key in mine:
        parameter = parameters[key]
        expected = share_of(parts, key, parameter, whole[key])
        found[key] = ((mine[key] - expected).norm() / expected.norm().clamp(min=1e-12)).item()
    return found


def share_of(parts: Parts, name: str, parameter: Tensor, whole: Tensor) -> Tensor:
    """Return what this rank holds of a whole parameter (or of its gradient)."""
    if parameter.dim() == 1:
        return whole
    gated = name.endswith("linear_fc1.weight")
    if is_routed_expert(name):
        whole = whole.chunk(parts.groups.ep.size())[parts.groups.ep.rank()]
        group, dim = parts.groups.expt_tp, parameter.partition_dim
    else:
        ((_, _, group, dim),) = _matrices(name, parameter, parts.groups, 0)
        if dim is None:
            return whole
    size, rank = group.size(), group.rank()
    if gated:
        return torch.cat([half.chunk(size, dim)[rank] for half in whole.chunk(2, dim)], dim)
    return whole.chunk(size, dim)[rank]
