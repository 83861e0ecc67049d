"""One optimizer step: microbatches through the pipeline, gradients reduced, biases and weights updated."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from torch import Tensor

from dsv3_megatron.build import Parts
from dsv3_megatron.optim.optimizer import set_learning_rate
from dsv3_megatron.routing.bias import update_expert_bias
from dsv3_megatron.routing.load import max_violation
from dsv3_megatron.routing.router import SequenceBalancedRouter

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class StepValues:
    """What the regime says of a step."""

    learning_rate: float
    mtp_weight: float
    bias_speed: float
    balance_weight: float


@dataclass(frozen=True)
class StepResult:
    """What a step measured, the same on every rank. Losses are nats per token of the whole global batch."""

    lm_loss: float
    mtp_loss: float | None
    balance_loss: float
    grad_norm: float
    max_violation: float | None
    bubble_fraction: float | None
    skipped: bool

    def objective(self, values: StepValues, sequence_length: int, depths: int) -> float:
        """Return the training objective: what the gradients are of.

        The paper divides the loss of depth k by T, not by the T - k positions it has (Eq. 24).
        """
        total = self.lm_loss + self.balance_loss
        if self.mtp_loss is not None:
            positions = sum(sequence_length - k for k in range(1, depths + 1)) / (depths * sequence_length)
            total += values.mtp_weight * self.mtp_loss * positions
        return total


class _TimedCommunicator(P2PCommunicator):
    """megatron-core's pipeline communicator, which also measures how long this rank stands in it."""

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        self.waited_seconds = 0.0

    def _communicate(self, *args: object, **kwargs: object) -> object:
        start = time.perf_counter()
        try:
            return super()._communicate(*args, **kwargs)
        finally:
            self.waited_seconds += time.perf_counter() - start


def slice_for_context(batch: Batch, parts: Parts) -> Batch:
    """Return this CP rank's pieces [B, S / CP] of a batch [B, S]: pieces r and 2 CP - 1 - r of the sequence."""
    size, rank = parts.groups.cp.size(), parts.groups.cp.rank()
    if size == 1:
        return batch
    return {
        name: torch.cat([x.chunk(2 * size, dim=1)[i] for i in (rank, 2 * size - 1 - rank)], dim=1)
        for name, x in batch.items()
    }


def _loss(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the sum over tokens, the number of tokens, and both for the report."""
    mask = loss_mask.view(-1).float()
    total, tokens = (losses.float().view(-1) * mask).sum(), mask.sum().to(torch.int)
    return total, tokens, {"lm": torch.stack([total.detach(), tokens.float()])}


def _forward(batches: Iterator[Batch], module: torch.nn.Module) -> tuple[Tensor, partial]:
    batch = next(batches)
    out = module(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=batch["loss_mask"])
    return out, partial(_loss, batch["loss_mask"])


def run_pipeline(parts: Parts, batches: list[Batch], *, forward_only: bool = False) -> tuple[Tensor, float]:
    """Run the microbatches through all stages; return ([loss sum, tokens], seconds this rank waited for others).

    The loss is there on the last stage only, zeros elsewhere; neither is reduced.
    """
    batches = [slice_for_context({k: x.to(parts.device) for k, x in b.items()}, parts) for b in batches]
    rows, columns = batches[0]["tokens"].shape
    communicator = _TimedCommunicator(parts.groups.pp, parts.config)
    run = get_forward_backward_func(pp_size=parts.groups.pp.size(), vp_size=None)
    results = run(
        forward_step_func=_forward,
        data_iterator=iter(batches),
        model=parts.ddp,
        num_microbatches=len(batches),
        seq_length=columns * parts.groups.cp.size(),
        micro_batch_size=rows,
        forward_only=forward_only,
        p2p_communicator=communicator if parts.groups.pp.size() > 1 else None,
        pg_collection=parts.groups,
    )
    total = torch.zeros(2, dtype=torch.float64, device=parts.device)
    for result in results if parts.is_last_stage else ():
        total += result["lm"]
    return total, communicator.waited_seconds


def train_step(parts: Parts, batches: list[Batch], values: StepValues) -> StepResult:
    """Train on one global batch, of which ``batches`` are this data-parallel rank's microbatches."""
    config = parts.config
    config.mtp_loss_scaling_factor = values.mtp_weight
    config.moe_aux_loss_coeff = values.balance_weight
    config.grad_scale_func = parts.optimizer.scale_loss
    config.finalize_model_grads_func = partial(_finalize, parts)
    parts.ddp.train()
    parts.ddp.zero_grad_buffer()
    parts.optimizer.zero_grad()
    start = time.perf_counter()
    total, waited = run_pipeline(parts, batches)
    pipeline_seconds = time.perf_counter() - start
    loads = _step_loads(parts)
    set_learning_rate(parts.optimizer, values.learning_rate)
    updated, grad_norm, _ = parts.optimizer.step()
    if updated:
        _update_biases(parts, loads, values.bias_speed)
    lm_loss = _mean_loss(parts, total)
    bubble = _mean_over_world(waited / pipeline_seconds, parts) if parts.layout.pp > 1 else None
    return StepResult(
        lm_loss=lm_loss,
        mtp_loss=_mtp_loss(parts, batches),
        balance_loss=_balance_loss(parts, len(batches)) * values.balance_weight,
        grad_norm=float(grad_norm) if grad_norm is not None else float("nan"),
        max_violation=_mean_violation(parts, loads),
        # A GPU's sends return before they are done: standing in them measures nothing there.
        bubble_fraction=bubble if parts.device.type == "cpu" else None,
        skipped=not updated,
    )


@torch.no_grad()
def evaluate_batches(parts: Parts, batches: list[Batch]) -> float:
    """Return the next-token loss of batches (this data-parallel rank's), in nats per token over all ranks."""
    parts.ddp.eval()
    depth, process = parts.config.mtp_num_layers, parts.module.mtp_process
    parts.config.mtp_num_layers, parts.module.mtp_process = None, False
    try:
        total, _ = run_pipeline(parts, batches, forward_only=True)
    finally:
        parts.config.mtp_num_layers, parts.module.mtp_process = depth, process
    return _mean_loss(parts, total)


# -- gradients ---------------------------------------------------------------------------------------------------------


def _finalize(
    parts: Parts,
    model: list[torch.nn.Module],
    num_tokens: Tensor | None,
    pg_collection: object = None,
    **unused: object,
) -> None:
    """Reduce gradients over all groups and divide them by the tokens of the step.

    megatron-core's own bias update and reset of the load counters are kept out: ours reads the counters first.
    """
    config = parts.config
    biased, config.moe_router_enable_expert_bias = config.moe_router_enable_expert_bias, False
    try:
        finalize_model_grads(model, num_tokens, pg_collection=parts.groups)
    finally:
        config.moe_router_enable_expert_bias = biased


def _routers(parts: Parts) -> list[torch.nn.Module]:
    return [m for m in parts.module.modules() if getattr(m, "expert_bias", None) is not None]


@torch.no_grad()
def _step_loads(parts: Parts) -> Tensor | None:
    """Return tokens per expert [layers of this stage, E] of the whole step, and start counting anew."""
    routers = _routers(parts)
    if not routers:
        return None
    loads = torch.stack([r.local_tokens_per_expert for r in routers])
    for router in routers:
        router.local_tokens_per_expert.zero_()
    # Every rank of the stage routes tokens of its own: TP by sequence parallelism, CP, DP.
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    dist.all_reduce(loads, group=group)
    return loads


@torch.no_grad()
def _update_biases(parts: Parts, loads: Tensor | None, speed: float) -> None:
    for router, load in zip(_routers(parts), loads if loads is not None else ()):
        router.expert_bias.copy_(update_expert_bias(router.expert_bias, load, speed=speed))


# -- what a step reports -----------------------------------------------------------------------------------------------


def _mean_loss(parts: Parts, total: Tensor) -> float:
    """Return sum / tokens over the last stage's ranks. TP ranks hold the same number, so one of them counts."""
    total = total if parts.groups.tp.rank() == 0 else torch.zeros_like(total)
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def _mean_over_world(value: float, parts: Parts) -> float:
    total = torch.tensor(value, dtype=torch.float64, device=parts.device)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def _mtp_loss(parts: Parts, batches: list[Batch]) -> float | None:
    """Return the mean over predicted positions, depths and sequences, from megatron-core's own tracker.

    The tracker holds each rank's mean over its positions. Depth k predicts all but the last k of a sequence, and the
    rank that holds the end (CP rank 0, by the zigzag order) has so many fewer: ranks are weighted by what they have.
    """
    depths = parts.config.mtp_num_layers
    if not depths:
        return None
    tracker = MTPLossLoggingHelper.tracker
    total = torch.zeros(2, dtype=torch.float64, device=parts.device)
    if parts.is_last_stage and "values" in tracker:
        if parts.groups.tp.rank() == 0:
            here = batches[0]["tokens"].shape[1] // parts.layout.cp
            missing = torch.arange(1, depths + 1, device=parts.device) * (parts.groups.cp.rank() == 0)
            positions = (here - missing).double()
            total[0] = (tracker["values"].double() * positions).sum()
            total[1] = positions.sum() * len(batches)
        MTPLossLoggingHelper.clean_loss_in_tracker()
    dist.all_reduce(total)
    return (total[0] / total[1].clamp(min=1)).item()


def _balance_loss(parts: Parts, microbatches: int) -> float:
    """Return the sequence-wise balance loss before its weight: mean over sequences, summed over layers."""
    total = torch.zeros((), dtype=torch.float64, device=parts.device)
    for module in parts.module.modules():
        if isinstance(module, SequenceBalancedRouter):
            total += module.balance_sum.double()
            module.balance_sum.zero_()
    dist.all_reduce(total)  # TP x CP ranks hold shares of the same sequences, stages hold layers, DP ranks sequences
    return total.item() / microbatches / parts.layout.dp


def _mean_violation(parts: Parts, loads: Tensor | None) -> float | None:
    """Return MaxVio, mean over all MoE layers of the model."""
    total = torch.zeros(2, dtype=torch.float64, device=parts.device)
    if loads is not None:
        violations = max_violation(loads)
        total[0], total[1] = violations.sum(), violations.numel()
    dist.all_reduce(total)
    return (total[0] / total[1]).item() if total[1] else None
