"""One optimizer step: microbatches through the pipeline, gradients reduced, biases and weights updated."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, MTPLossLoggingHelper
from torch import Tensor

from dsv3_megatron.metrics.step_metrics import peak_memory_bytes
from dsv3_megatron.model.depth_masks import with_depth_masks
from dsv3_megatron.optim.optimizer import clip_and_step, set_learning_rate
from dsv3_megatron.pipeline.model_stages import Batch
from dsv3_megatron.pipeline.parts import Parts
from dsv3_megatron.pipeline.qk_clip import HeadLogits
from dsv3_megatron.routing.router import SequenceBalancedRouter
from dsv3_megatron.train.expert_load import (
    gather_loads,
    max_violation,
    step_loads,
    step_overflow,
    update_biases,
)
from dsv3_megatron.train.gradients import finish_gradients
from parallel.device import to_device


@dataclass(frozen=True)
class StepValues:
    """What the regime says of a step."""

    learning_rate: float
    mtp_weight: float
    bias_speed: float
    balance_weight: float
    mtp_depth_decay: float = 1.0


@dataclass(frozen=True)
class StepResult:
    """What a step measured, the same on every rank. Losses are nats per token of the whole global batch."""

    lm_loss: float
    mtp_loss: float | None
    mtp_objective: float
    balance_loss: float
    grad_norm: float
    loads: np.ndarray | None  # tokens per expert of every MoE layer of the model, MTP's last: [layers, experts] float64
    logits: HeadLogits | None  # the largest attention logits, where optim.qk_clip is set
    overflow: tuple[int, int] | None  # choices (rerouted, dropped) for want of room, where experts have a capacity
    bubble_fraction: float | None
    pipeline_seconds: float
    memory_peaks: np.ndarray  # the most each rank has held so far, bytes: [ranks] float64
    data_waits: np.ndarray  # seconds each rank has waited for its samples: [ranks] float64
    skipped: bool

    @property
    def max_violation(self) -> float | None:
        """MaxVio, mean over all MoE layers of the model."""
        return None if self.loads is None else max_violation(torch.from_numpy(self.loads)).mean().item()

    @property
    def clipped_heads(self) -> int | None:
        """Heads whose projections this step has scaled down: none where it was skipped."""
        return None if self.logits is None else 0 if self.skipped else self.logits.clipped

    @property
    def objective(self) -> float:
        """The training objective: what the gradients are of."""
        return self.lm_loss + self.balance_loss + self.mtp_objective


def slice_for_context(batch: Batch, parts: Parts) -> Batch:
    """Return this CP rank's pieces [B, S / CP] of a batch [B, S]: pieces r and 2 CP - 1 - r of the sequence."""
    size, rank = parts.groups.cp.size(), parts.groups.cp.rank()
    if size == 1:
        return batch
    return {
        name: torch.cat([x.chunk(2 * size, dim=1)[i] for i in (rank, 2 * size - 1 - rank)], dim=1)
        if name != "documents"  # attention sees whole sequences
        else x
        for name, x in batch.items()
    }


def run_pipeline(parts: Parts, batches: list[Batch], *, training: bool) -> tuple[Tensor, float]:
    """Run the microbatches through all stages; return ([loss sum, tokens], seconds this rank waited for others).

    The loss is what the last stage computed on this rank (zeros elsewhere), not reduced.
    """
    depths = parts.recipe.model.num_nextn_predict_layers if training else 0
    batches = [with_depth_masks({k: to_device(x, parts.device) for k, x in b.items()}, depths) for b in batches]
    batches = [slice_for_context(b, parts) for b in batches]
    schedule, engine = parts.engine(len(batches), training=training)
    parts.stages.begin(schedule.kinds, batches, training=training)
    engine.run()
    return parts.stages.loss, engine.waited_seconds


def train_step(
    parts: Parts,
    batches: list[Batch],
    values: StepValues,
    may_update: Callable[[float, float], bool] = lambda loss, norm: True,
    waited_seconds: float = 0.0,
) -> StepResult:
    """Train on one global batch, of which ``batches`` are this data-parallel rank's microbatches.

    ``may_update``: asked with the step's loss and gradient norm, the same on all ranks, before anything is changed;
    where it says no, weights, moments and router biases stay as they are. An average of the weights (``parts.ema``) is
    the caller's to wait for there, and to update afterwards (callbacks/average.py).
    ``waited_seconds``: how long this rank has waited for the batches, to be reported with the others'.
    """
    for config in parts.configs:
        config.mtp_loss_scaling_factor = values.mtp_weight
        config.moe_aux_loss_coeff = values.balance_weight
    parts.stages.mtp_depth_decay = values.mtp_depth_decay
    # [], as megatron-core makes it where a backward runs without: it copies later ones into the first of the process.
    scale = parts.optimizer.scale_loss(torch.ones((), device=parts.device)).reshape(())
    MTPLossAutoScaler.set_loss_scale(scale)
    MoEAuxLossAutoScaler.set_loss_scale(scale)
    for ddp in parts.ddps.values():
        ddp.zero_grad_buffer()
    parts.optimizer.zero_grad()
    start = time.perf_counter()
    total, waited = run_pipeline(parts, batches, training=True)
    pipeline_seconds = time.perf_counter() - start
    parts.watchdog.enter("the end of the step: gradients, optimizer, metrics")
    tokens = _counted_tokens(parts, batches)
    finish_gradients(list(parts.ddps.values()), parts.groups, tokens=tokens, embedding_copy=parts.embedding_copy)
    loads = step_loads(parts)
    logits = parts.qk_clip.take() if parts.qk_clip is not None else None
    set_learning_rate(parts.optimizer, values.learning_rate)
    lm_loss = mean_loss(parts, total)
    parts.optimizer.prepare_grads()
    grad_norm = float(parts.optimizer.get_grad_norm())
    updated = may_update(lm_loss, grad_norm) and clip_and_step(parts.optimizer, grad_norm)
    if updated:
        update_biases(parts, loads, values.bias_speed)
    # A GPU's sends return before they are done: standing in them measures nothing there.
    measured = parts.layout.pp > 1 and parts.device.type == "cpu"
    bubble = _mean_over_world(waited / pipeline_seconds, parts) if measured else None
    mtp_loss, mtp_objective = _mtp_losses(parts, values, tokens)
    whole_loads, (peaks, waits) = gather_loads(parts, loads, (peak_memory_bytes(parts.device), waited_seconds))
    return StepResult(
        lm_loss=lm_loss,
        mtp_loss=mtp_loss,
        mtp_objective=mtp_objective,
        balance_loss=_balance_loss(parts, len(batches)) * values.balance_weight,
        grad_norm=grad_norm,
        loads=whole_loads,
        logits=logits,
        overflow=step_overflow(parts),
        bubble_fraction=bubble,
        pipeline_seconds=pipeline_seconds,
        memory_peaks=peaks,
        data_waits=waits,
        skipped=not updated,
    )


# -- tokens ------------------------------------------------------------------------------------------------------------


def _counted_tokens(parts: Parts, batches: list[Batch]) -> Tensor:
    """Return the tokens of the whole step that count, [] float64: every pipeline rank reads the same batches."""
    tokens = to_device(torch.stack([batch["loss_mask"].double().sum() for batch in batches]).sum(), parts.device)
    coordinates = parts.layout.coordinates(dist.get_rank())
    # Every DP rank counts once, at tensor, context and pipeline rank 0.
    counts = coordinates["tp"] == coordinates["cp"] == coordinates["pp"] == 0
    tokens = tokens if counts else torch.zeros_like(tokens)
    dist.all_reduce(tokens)
    return tokens


# -- what a step reports -----------------------------------------------------------------------------------------------


def mean_loss(parts: Parts, total: Tensor) -> float:
    """Return sum / tokens of ``total`` over the last stage's ranks: of TP ranks, which hold the same, one counts."""
    total = total if parts.groups.tp.rank() == 0 else torch.zeros_like(total)
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def _mean_over_world(value: float, parts: Parts) -> float:
    total = torch.tensor(value, dtype=torch.float64, device=parts.device)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def _mtp_losses(parts: Parts, values: StepValues, tokens: Tensor) -> tuple[float | None, float]:
    """Return (mean over all positions and depths that count, share of the objective).

    The objective divides the loss of depth k by the tokens of the step, not by the fewer positions that depth has
    (arXiv 2412.19437 Eq. 24), and weighs it by lambda / depths and the depth's own weight. megatron-core's tracker
    holds each rank's sum by depth (model.depth_masks).
    """
    depths = parts.recipe.model.num_nextn_predict_layers
    if not depths:
        return None, 0.0
    total = torch.zeros(2, depths, dtype=torch.float64, device=parts.device)
    if parts.stages.last_stage_microbatches:
        if parts.groups.tp.rank() == 0:
            total[0] = MTPLossLoggingHelper.tracker["values"]
            total[1] = parts.stages.mtp_positions
        MTPLossLoggingHelper.clean_loss_in_tracker()
    dist.all_reduce(total)
    weights = values.mtp_depth_decay ** torch.arange(depths, dtype=torch.float64, device=parts.device)
    objective = values.mtp_weight / depths * (total[0] * weights).sum() / tokens
    mean, objective = torch.stack([total[0].sum() / total[1].sum().clamp(min=1), objective]).tolist()
    return mean, objective


def _balance_loss(parts: Parts, microbatches: int) -> float:
    """Return the sequence-wise balance loss before its weight: mean over sequences, summed over layers."""
    total = torch.zeros((), dtype=torch.float64, device=parts.device)
    for module in (m for chunk in parts.chunks.values() for m in chunk.modules()):
        if isinstance(module, SequenceBalancedRouter):
            total += module.balance_sum.double()
            module.balance_sum.zero_()
    dist.all_reduce(total)  # TP x CP ranks hold shares of the same sequences, stages hold layers, DP ranks sequences
    return total.item() / microbatches / parts.layout.dp
