"""The article's routing: softmax over the selected experts, each of which has room for so many tokens.

A widely read article describes DeepSeek-V3 with top-2 soft routing and capacity-aware token allocation instead of the
published auxiliary-loss-free balancing: a token whose expert is full goes to its next best expert with room. What the
article leaves open is chosen here and can be read in ``allocate``: first choices are served before second ones and
earlier tokens before later ones (GShard's order, arXiv 2006.16668), and capacity counts the tokens of one microbatch
on one data-parallel rank. In evaluation there is no capacity, so that a token's experts never depend on other tokens.

Legend: S sequence, B microbatch, T = S * B tokens in the order of positions, E experts, K experts a token is sent to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv3_megatron.routing.gate import affinities
from dsv3_megatron.routing.router import SequenceBalancedRouter


@dataclass(frozen=True)
class Allocation:
    """Which experts tokens go to.

    Args:
        chosen: [T, E] bool, at most K a token and ``capacity`` an expert.
        rerouted: [] int64, choices that went to an expert outside the token's K best.
        dropped: [] int64, choices for which no expert had room.
    """

    chosen: Tensor
    rerouted: Tensor
    dropped: Tensor


def expert_capacity(tokens: int, topk: int, experts: int, factor: float) -> int:
    """Return how many tokens an expert has room for: ``factor`` times its even share, rounded up."""
    return math.ceil(factor * tokens * topk / experts)


def allocate(scores: Tensor, topk: int, capacity: int) -> Allocation:
    """Give every token its ``topk`` best experts that have room.

    Choice by choice, each waiting token asks the best expert that it does not have yet and that is not full; an expert
    with more askers than room takes those that come first, and the others ask on. A round fills an expert or ends the
    choice, so there are at most E + 1 rounds a choice.

    Args:
        scores: [T, E], higher is better.
        topk: K.
        capacity: tokens of an expert, >= 0.
    """
    tokens, experts = scores.shape
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    room = torch.full((experts,), capacity, dtype=torch.int64, device=scores.device)
    wanted = torch.zeros_like(chosen).scatter_(1, scores.topk(topk, dim=1).indices, True)
    dropped = torch.zeros((), dtype=torch.int64, device=scores.device)
    for _ in range(topk):
        waiting = torch.arange(tokens, device=scores.device)
        while len(waiting):
            closed = chosen[waiting] | (room == 0)
            best, expert = scores[waiting].masked_fill(closed, float("-inf")).max(dim=1)
            stuck = best == float("-inf")
            dropped += stuck.sum()
            waiting, expert = waiting[~stuck], expert[~stuck]
            asks = torch.zeros(len(waiting), experts, dtype=torch.int64, device=scores.device)
            asks.scatter_(1, expert.unsqueeze(1), 1)
            turn = asks.cumsum(0).gather(1, expert.unsqueeze(1)).squeeze(1)  # 1 = the first to ask this expert
            served = turn <= room[expert]
            chosen[waiting[served], expert[served]] = True
            room -= asks[served].sum(0)
            waiting = waiting[~served]
    return Allocation(chosen, (chosen & ~wanted).sum(), dropped)


class CapacityRouter(SequenceBalancedRouter):
    """Top-k router with softmax over the selected experts and a capacity for each.

    ``overflow`` adds up [rerouted, dropped, choices] of the step's microbatches; the trainer reads and clears it.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        overflow = torch.zeros(3, dtype=torch.float64, device=torch.cuda.current_device())
        self.register_buffer("overflow", overflow, persistent=False)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return weights and choices of the experts, both [S * B, E], from logits [S, B, E]."""
        assert padding_mask is None, "sequences are packed full: nothing is padded"
        flat = logits.reshape(-1, logits.shape[-1]).float()
        tokens, experts = flat.shape
        if self.training:
            capacity = expert_capacity(tokens, self.topk, experts, self.config.moe_expert_capacity_factor)
            found = allocate(flat.detach(), self.topk, capacity)
            chosen = found.chosen
            if torch.is_grad_enabled():  # once a microbatch, recomputation or not
                choices = torch.full((), tokens * self.topk, device=chosen.device)
                self.overflow += torch.stack([found.rerouted, found.dropped, choices])
                self.local_tokens_per_expert += chosen.sum(0)
        else:
            best = flat.topk(self.topk, dim=1).indices
            chosen = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, best, True)
        share = selected_softmax(flat, chosen) if self.normalise else affinities(flat, "softmax") * chosen
        weights = share * self.config.moe_router_topk_scaling_factor
        weight = self.config.moe_aux_loss_coeff
        if weight and self.training and torch.is_grad_enabled():
            weights = self._attach_balance_loss(weights, logits, chosen, weight)
        return weights, chosen


def selected_softmax(logits: Tensor, chosen: Tensor) -> Tensor:
    """Return the softmax of logits [T, E] over each token's chosen experts; zeros where there is none."""
    masked = logits.masked_fill(~chosen, float("-inf"))
    # A row without an expert has no softmax; any finite row gives it one, which is then zeroed.
    masked = torch.where(chosen.any(-1, keepdim=True), masked, torch.zeros_like(masked))
    return masked.softmax(-1) * chosen
