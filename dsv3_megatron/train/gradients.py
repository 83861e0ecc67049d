"""What happens to gradients between the last weight gradient and the optimizer."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor


def wrap_for_reduction(
    config: MLATransformerConfig, module: torch.nn.Module, groups: ProcessGroupCollection, settings: object
) -> DistributedDataParallel:
    """Return the module with gradient buffers whose reduction the engine starts, stage by stage.

    megatron-core starts reductions from autograd hooks or, without overlap, blocks. Ours are started by the schedule
    and waited for at the end of the step, so only its bucket groups are told to be asynchronous (0.16.1; can go when
    ``start_grad_sync`` takes that as an argument).
    """
    ddp = DistributedDataParallel(config, settings, module, pg_collection=groups)
    asynchronous = dataclasses.replace(ddp.ddp_config, overlap_grad_reduce=True)
    for group in ddp.bucket_groups + ddp.expert_parallel_bucket_groups:
        group.ddp_config = asynchronous
    return ddp


def finish_gradients(
    ddps: list[DistributedDataParallel],
    groups: ProcessGroupCollection,
    *,
    tokens: Tensor,
    embedding_copy: Tensor | None,
) -> None:
    """Wait for the reductions, add what other groups hold, and divide by the tokens of the step.

    Args:
        ddps: this rank's stages, reductions started.
        tokens: [] tokens of the whole step that count.
        embedding_copy: the embedding, where the first and the last stage each train a copy (groups.embd).
    """
    for ddp in ddps:
        ddp.finish_grad_sync()
    if groups.tp.size() > 1:
        _sum_sequence_parallel(ddps, groups.tp)
    if embedding_copy is not None:
        dist.all_reduce(embedding_copy.main_grad, group=groups.embd)
    scale = 1.0 / tokens.item()
    for ddp in ddps:
        ddp.scale_gradients(scale)


def _sum_sequence_parallel(ddps: list[DistributedDataParallel], group: dist.ProcessGroup) -> None:
    """Sum the gradients of parameters that every TP rank holds whole while each saw its share of the sequence."""
    held = (p for ddp in ddps for p in ddp.module.parameters() if p.requires_grad)
    grads = [p.main_grad for p in held if getattr(p, "sequence_parallel", False)]
    if not grads:
        return
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat, group=group)
    for grad, summed in zip(grads, flat.split([g.numel() for g in grads])):
        grad.copy_(summed.view_as(grad))
