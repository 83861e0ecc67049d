"""DeepSeek-V3's router: group-limited top-k of sigmoid affinities, and the sequence-wise balance loss.

megatron-core's TopKRouter holds the weights and the bias. The selection is ours (``gate.py``), because its own (0.16.1)
always normalises sigmoid weights, but never those of a single expert, and scores groups by another number of experts
than the published models. So is the balance loss, because its own, with losses summed over tokens as we train, scales
the gradient down by the sequences of a microbatch and by the TP x CP ranks, and counts a top-k of its own without bias
and groups instead of the experts that tokens are sent to.

Legend: S sequence on this rank, B microbatch, E experts.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, router_gating_linear
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from dsv3_megatron.precision.weight_gradients import gate
from dsv3_megatron.routing.gate import affinities, best_experts, weights_of


class SequenceBalancedRouter(TopKRouter):
    """Top-k router whose balance loss follows arXiv 2412.19437 Eq. 17 to 20.

    ``balance_sum`` adds up, microbatch by microbatch, this rank's share of the loss before its weight (mean over the
    microbatch's sequences), and ``local_tokens_per_expert`` counts its tokens, with a bias or without; the trainer
    reads and clears both once a step. ``bias_is_frozen``: no step moves the bias.

    Args:
        normalise: the weights of a token's experts add up to 1, before the scaling.
        group_best: a group is scored by its so many best experts.
    """

    bias_is_frozen = False

    def __init__(self, *args: object, normalise: bool = True, group_best: int = 2, **kwargs: object):
        super().__init__(*args, **kwargs)
        self.normalise, self.group_best = normalise, group_best
        device = torch.cuda.current_device()
        self.register_buffer("balance_sum", torch.zeros((), dtype=torch.float32, device=device), persistent=False)
        if not self.enable_expert_bias:
            del self.local_tokens_per_expert  # None, where megatron-core needs no counts
            counts = torch.zeros(self.config.num_moe_experts, dtype=torch.float32, device=device)
            self.register_buffer("local_tokens_per_expert", counts, persistent=False)

    def gating(self, input: Tensor) -> Tensor:
        """Return logits [S, B, E], float32, from the layer's input [S, B, D]."""
        return gate(input, self.weight, lambda x, weight: router_gating_linear(x, weight, None, torch.float32))

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return weights and choices of the experts, both [S * B, E], from logits [S, B, E]."""
        assert padding_mask is None, "sequences are packed full: nothing is padded"
        config, flat = self.config, logits.reshape(-1, logits.shape[-1])
        affinity = affinities(flat, self.score_function)
        experts = best_experts(
            affinity.detach() if self.expert_bias is None else affinity.detach() + self.expert_bias,
            self.topk,
            groups=config.moe_router_num_groups or 1,
            open_groups=config.moe_router_group_topk or 1,
            group_best=self.group_best,
        )
        found = weights_of(affinity, experts, normalise=self.normalise) * config.moe_router_topk_scaling_factor
        weights = torch.zeros_like(affinity).scatter(1, experts, found)
        chosen = torch.zeros_like(affinity, dtype=torch.bool).scatter(1, experts, True)
        weight = self.config.moe_aux_loss_coeff
        if weight and self.training and torch.is_grad_enabled():
            weights = self._attach_balance_loss(weights, logits, chosen, weight)
        if torch.is_grad_enabled():  # once a microbatch, recomputation or not; never in evaluation
            self.local_tokens_per_expert += chosen.sum(0)
        return weights, chosen

    def _attach_balance_loss(self, weights: Tensor, logits: Tensor, chosen: Tensor, weight: float) -> Tensor:
        """Return ``weights`` unchanged, with the balance loss's gradient hung onto them."""
        ranks = self.tp_cp_group.size()
        counts = chosen.view(logits.shape).sum(0, dtype=torch.float32)  # [B, E]
        if ranks > 1:
            dist.all_reduce(counts, group=self.tp_cp_group)
        affinity = balance_affinity(logits, self.score_function).sum(0)  # [B, E], this rank's tokens
        tokens = logits.shape[0] * ranks  # of one whole sequence
        per_sequence = sequence_balance(counts, affinity, tokens, self.topk)
        self.balance_sum += per_sequence.detach().mean()
        # Gradients are divided by the tokens of the whole step at its end; a mean over sequences therefore enters as
        # a sum over sequences, times the tokens of one.
        return MoEAuxLossAutoScaler.apply(weights, weight * tokens * per_sequence.sum())


def balance_affinity(logits: Tensor, score_function: str) -> Tensor:
    """Return the affinities [..., E] normalised to a sum of 1 over all experts (Eq. 19)."""
    affinity = affinities(logits, score_function)
    return affinity if score_function == "softmax" else affinity / (affinity.sum(-1, keepdim=True) + 1e-20)


def sequence_balance(counts: Tensor, affinity_sum: Tensor, tokens: int, topk: int) -> Tensor:
    """Return sum_i f_i P_i of each sequence [B]; 1 when the load is even.

    Args:
        counts: [B, E] tokens of the whole sequence sent to each expert.
        affinity_sum: [B, E] normalised affinities summed over tokens (of this rank: the results add up over ranks).
        tokens: length of the whole sequence.
        topk: experts a token is sent to.
    """
    experts = counts.shape[-1]
    fraction = counts * (experts / (topk * tokens))
    return (fraction * affinity_sum / tokens).sum(-1)
