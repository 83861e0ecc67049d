"""The gate's mathematics: which experts a token goes to, and with what weights.

Legend: T tokens, E experts, K experts a token is sent to.
Source: arXiv 2412.19437 section 2.1.2 and transformers' ``DeepseekV3TopkRouter`` (groups by their two best experts);
arXiv 2405.04434 section 2.1.2 and ``DeepseekV2TopkRouter`` (groups by their best).
"""

from __future__ import annotations

import torch
from torch import Tensor


def affinities(logits: Tensor, score_function: str) -> Tensor:
    """Return the float32 affinities [..., E] of tokens to experts."""
    return logits.float().softmax(-1) if score_function == "softmax" else logits.float().sigmoid()


def best_experts(scores: Tensor, topk: int, *, groups: int, open_groups: int, group_best: int) -> Tensor:
    """Return the K best experts [T, K] inside each token's best groups.

    Args:
        scores: [T, E], higher is better.
        groups, open_groups: groups of neighbouring experts, and how many of them a token may be sent to.
        group_best: a group's score is the sum of its so many best experts'.
    """
    if groups > 1:
        grouped = scores.view(len(scores), groups, -1)
        best = grouped.topk(group_best, dim=-1).values.sum(-1).topk(open_groups, dim=-1, sorted=False).indices
        closed = torch.ones(grouped.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, best, False)
        scores = grouped.masked_fill(closed.unsqueeze(-1), float("-inf")).view_as(scores)
    return scores.topk(topk, dim=-1).indices


def weights_of(affinity: Tensor, experts: Tensor, *, normalise: bool) -> Tensor:
    """Return the weights [T, K] of a token's experts [T, K]: their affinities [T, E], made to add up to 1 or not."""
    weights = affinity.gather(1, experts)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) if normalise else weights
