"""Even routing for fake tensors, which have shapes but no numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from dsv3_megatron.megatron.replaced import replaced


@contextlib.contextmanager
def balanced_dispatch() -> Iterator[None]:
    """Let the all-to-all dispatcher send the same number of tokens to every expert inside, whatever the router says.

    Why: fake tensors have shapes but no numbers, and who is sent where is a number. Balanced routing is what a plan
    assumes anyway. Three spots read numbers (megatron-core 0.16.1); each can go when a fake forward of a MoE layer
    passes without it.
    """
    import numpy  # the exact path alone needs these
    from megatron.core.transformer.moe import token_dispatcher as module

    dispatcher = module.MoEAlltoAllTokenDispatcher

    def preprocess(self: object, routing_map: torch.Tensor) -> object:
        sent, experts = routing_map.size(0) * self.config.moe_router_topk, self.num_experts
        counts = numpy.full(experts, sent // experts) + (numpy.arange(experts) < sent % experts)
        local = counts[self.local_expert_indices]
        self.num_out_tokens = sent
        if self.ep_size > 1 or self.tp_size > 1:
            self.input_splits = counts.reshape(self.ep_size, -1).sum(1)
            self.output_splits = numpy.full(self.ep_size, local.sum())
            self.output_splits_tp = numpy.full(self.tp_size, local.sum() * self.ep_size)
            self._maybe_update_cuda_sync_point("before_ep_alltoall")
        self.num_global_tokens_per_local_expert = local
        return local * self.ep_size * self.tp_size

    def permute(
        tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor | None = None, **sizes: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        index = torch.zeros(sizes["num_out_tokens"], dtype=torch.int64, device=tokens.device)
        chosen = None if probs is None else probs.T.contiguous().view(-1).index_select(0, index)
        return tokens.index_select(0, index), chosen, index

    def sort_chunks_by_idxs(
        tokens: torch.Tensor, split_sizes: object, sorted_idxs: object, probs: torch.Tensor | None = None, **how: object
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if sorted_idxs is None:
            return tokens, probs
        index = torch.arange(tokens.shape[0], device=tokens.device)
        return tokens.index_select(0, index), None if probs is None else probs.index_select(0, index)

    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in (
            (dispatcher, "preprocess", preprocess),
            (dispatcher, "_maybe_dtoh_and_synchronize", lambda self, point, counts=None: counts),
            (module, "permute", permute),
            (module, "sort_chunks_by_idxs", sort_chunks_by_idxs),
        ):
            stack.enter_context(replaced(owner, name, stand_in))
        yield
