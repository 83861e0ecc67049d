"""What the last stage makes of labels when nothing is trained: how likely they are, and whether it would choose them.

Legend: B microbatch, S sequence on this rank, V vocabulary on this tensor-parallel rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

FIELDS = ("log-likelihood", "tokens", "misses")  # of a sequence, in the order of its scores


def sequence_scores(losses: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Return [B, 3] float64 (``FIELDS``): over the tokens that count, the sum of log-probabilities in nats, how many
    they are, and how many of them are not the model's own choice. Sums over context-parallel ranks add up.

    Args:
        losses: [B, S] negative log-probability of every label.
        chosen: [B, S] bool, whether the label is the likeliest token.
        weights: [B, S] how much each label counts.
    """
    weights = weights.double()
    each = torch.stack([-losses.double() * weights, weights, (~chosen & (weights > 0)).double()], dim=-1)
    return each.sum(1)


def is_likeliest(logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return [B, S] bool: whether the label is the likeliest token, of equally likely ones the first.

    Args:
        logits: [B, S, V] of this rank's part of the vocabulary.
        labels: [B, S] in the whole vocabulary.
        group: the tensor-parallel ranks, which hold the vocabulary in order.
    """
    best, where = logits.max(-1)
    where = where + group.rank() * logits.shape[-1]
    if group.size() > 1:
        overall = best.clone()
        dist.all_reduce(overall, op=dist.ReduceOp.MAX, group=group)
        where = where.masked_fill(best < overall, torch.iinfo(where.dtype).max)
        dist.all_reduce(where, op=dist.ReduceOp.MIN, group=group)
    return where == labels
