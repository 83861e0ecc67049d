"""The largest attention logit of each head, which QK-clip goes by (train/qk_clip.py): softmax_scale * q k^T, causal.

Fused attention kernels keep it to themselves, so logits are computed once more in the forward, a block at a time, by
the same code beside every attention. Transformer Engine has a maximum of its own (``return_max_logit``, which
megatron-core 0.16.1 asks for under its ``qk_clip``). It is not used: asked for it, TE (2.20) gives up FlashAttention;
where no fused kernel is left, the maximum is that of S x S scores in BF16; evaluations are counted in; and under
context parallelism every layer's forward waits for an all-reduce.

Legend: S sequence, B microbatch, H heads on this TP rank, Q width of query and key.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.multi_latent_attention import MultiLatentAttention
from torch import Tensor

from dsv3_megatron.model.costs import LOGITS_AT_ONCE, logit_block
from dsv3_megatron.model.layers.context import to_heads


class MaxLogits:
    """The largest logit of every head of one attention since it was last taken."""

    def __init__(self, heads: int, softmax_scale: float, device: torch.device):
        """``heads``: H. ``softmax_scale``: above 0, what a product of query and key is multiplied with."""
        self._scale = softmax_scale
        self._largest = torch.full((heads,), float("-inf"), device=device)

    @torch.no_grad()
    def see(self, query: Tensor, key: Tensor, first_head: int = 0) -> None:
        """Look at the logits of whole causal sequences, query and key [S, B, heads from ``first_head`` on, Q]."""
        mine = self._largest[first_head : first_head + query.shape[2]]
        torch.maximum(mine, causal_max(query, key) * self._scale, out=mine)  # NaN where either is

    def take(self) -> Tensor:
        """Return [H] float32, -inf where nothing was seen and NaN where a logit was NaN, and start again."""
        largest = self._largest.clone()
        self._largest.fill_(float("-inf"))
        return largest


@torch.no_grad()
def causal_max(query: Tensor, key: Tensor, at_once: int = LOGITS_AT_ONCE) -> Tensor:
    """Return the largest product of a query and a key that is not after it, of each head: [heads] float32.

    Args:
        query, key: [S, B, heads, Q].
        at_once: products held at a time, unless a single query has more keys.
    """
    length, batch, heads, _ = query.shape
    rows, together = logit_block(length, heads, at_once)
    found = torch.full((heads,), float("-inf"), device=query.device)
    later = torch.ones(rows, rows, dtype=torch.bool, device=query.device).triu(1)
    for number in range(batch):
        q, k = query[:, number].transpose(0, 1), key[:, number].transpose(0, 1)
        for head in range(0, heads, together):
            some = slice(head, head + together)
            for first in range(0, length, rows):
                last = min(first + rows, length)
                products = _products(q[some, first:last], k[some, :last])
                products[:, :, first:].masked_fill_(later[: last - first, : last - first], float("-inf"))
                torch.maximum(found[some], products.amax((1, 2)), out=found[some])
    return found


def _products(query: Tensor, key: Tensor) -> Tensor:
    """Return [heads, queries, keys] float32, not rounded to the operands' format on the way."""
    if query.dtype is not torch.float32 and query.device.type == "cuda":
        return torch.bmm(query, key.transpose(1, 2), out_dtype=torch.float32)
    return torch.bmm(query.float(), key.float().transpose(1, 2))


def watch_logits(attention: MultiLatentAttention) -> MaxLogits:
    """Let an attention look for its largest logits in training; return where they are found."""
    core, device = attention.core_attention, attention.linear_proj.weight.device
    largest = MaxLogits(attention.num_attention_heads_per_partition, attention.softmax_scale, device)
    if hasattr(core, "max_logits"):
        core.max_logits = largest  # shown whole sequences and documents, with the heads of this CP rank
    else:
        core.register_forward_pre_hook(partial(_see_inputs, largest, attention.pg_collection.cp))
    return largest


def _see_inputs(largest: MaxLogits, cp: dist.ProcessGroup, core: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
    """Look at what Transformer Engine's attention is given: query and key [S / CP, B, H, Q], as pieces r and
    2 CP - 1 - r of the sequence. Documents are never isolated there (train/build.py)."""
    if not core.training:
        return
    query, key = inputs[0].detach(), inputs[1].detach()
    if cp.size() == 1:
        largest.see(query, key)
        return
    query, key = to_heads(query, cp), to_heads(key, cp)
    largest.see(query, key, cp.rank() * query.shape[2])
