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


def is_likeliest(logits: Tensor, labels: Tensor, group: dist.ProcessGroup, *, host_may_wait: bool) -> Tensor:
    """Return [B, S] bool: whether the label is the likeliest token, of equally likely ones the first.

    Args:
        logits: [B, S, V] of this rank's part of the vocabulary.
        labels: [B, S] in the whole vocabulary.
        group: the tensor-parallel ranks, which hold the vocabulary in order.
        host_may_wait: as on a CPU, where the place of the likeliest takes many times as long as how likely it is, and
            is asked for the few tokens only for which it matters. Which they are a GPU's host would have to wait for.
    """
    size, first = logits.shape[-1], group.rank() * logits.shape[-1]
    best, own = logits.amax(-1), labels - first
    held = (own >= 0) & (own < size)
    value = logits.gather(-1, own.clamp(0, size - 1).unsqueeze(-1)).squeeze(-1)
    _over(group, best, dist.ReduceOp.MAX)
    chosen = _over(group, (held & (value == best)).int(), dist.ReduceOp.MAX).bool()
    asked = chosen.clone() if host_may_wait else ...
    ahead, where = logits[asked].max(-1)
    where = (where + first).masked_fill(ahead < best[asked], torch.iinfo(where.dtype).max)
    chosen[asked] &= _over(group, where, dist.ReduceOp.MIN) == labels[asked]
    return chosen


def _over(group: dist.ProcessGroup, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    """Return ``values`` reduced over the ranks of a group, in place."""
    if group.size() > 1 and values.numel():
        dist.all_reduce(values, op=operation, group=group)
    return values
