"""Core attention of the torch backend: softmax(q k^T * scale) v, causal.

Shapes: S sequence on this rank, B microbatch, H heads on this rank, Q width of q and k, V width of v.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


class CoreAttention(MegatronModule):
    """torch's fused attention behind the interface megatron-core expects.

    Takes MLA's unequal widths (Q 192, V 128 in DeepSeek-V3), context parallelism and packed documents.
    """

    def __init__(
        self,
        config: object,
        layer_number: int,
        attn_mask_type: object,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: object = None,
        **unused: object,
    ):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.cp_group = pg_collection.cp if pg_collection is not None and hasattr(pg_collection, "cp") else None
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: object = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Return [S, B, H * V] from query, key [S, B, H, Q] and value [S, B, H, V].

        With ``packed_seq_params`` (thd): tokens [S, H, .] of several documents in a row, each attending to itself
        only; returns [S, H, V]. The mask is always causal; ``attention_mask`` is not read.
        """
        dropout = self.dropout if self.training else 0.0
        if packed_seq_params is not None:
            return self._documents(query, key, value, packed_seq_params.cu_seqlens_q, dropout)
        mask = None
        if self.cp_group is not None and self.cp_group.size() > 1:
            mask = _zigzag_mask(query.shape[0], self.cp_group.rank(), self.cp_group.size(), query.device)
            key, value = (_GatherSequence.apply(x, self.cp_group) for x in (key, value))
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale, dropout_p=dropout
        )
        return out.permute(2, 0, 1, 3).flatten(2)

    def _documents(self, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, dropout: float) -> Tensor:
        """Attend document by document: no pair of tokens of two documents is ever computed."""
        lengths = bounds.diff().tolist()
        outs = []
        for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths)):
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale, dropout_p=dropout)
            outs.append(out.squeeze(0).transpose(0, 1))
        return torch.cat(outs)


def _zigzag_mask(length: int, rank: int, size: int, device: torch.device) -> Tensor:
    """Return [S, S * size] bool: which keys a rank's queries may see.

    A rank holds pieces ``rank`` and ``2 * size - 1 - rank`` of the sequence's 2 * size, so that every rank has the
    same causal work.
    """
    half = length // 2
    pieces = (rank, 2 * size - 1 - rank)
    positions = torch.cat([torch.arange(p * half, (p + 1) * half, device=device) for p in pieces])
    return torch.arange(length * size, device=device) <= positions.unsqueeze(1)


class _GatherSequence(torch.autograd.Function):
    """All-gather of keys or values over CP, [S, ...] zigzag -> [S * CP, ...] in order; backward reduce-scatters."""

    @staticmethod
    def forward(ctx: object, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, size = group, group.size()
        gathered = x.new_empty((size, *x.shape))
        dist.all_gather_into_tensor(gathered.view(-1), x.contiguous().view(-1), group=group)
        first, second = gathered.chunk(2, dim=1)
        return torch.cat([first.flatten(0, 1), second.flip(0).flatten(0, 1)])

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        size = ctx.group.size()
        first, second = grad.view(2, size, -1, *grad.shape[1:])
        by_rank = torch.cat([first, second.flip(0)], dim=1).contiguous()
        mine = torch.empty_like(by_rank[0])
        dist.reduce_scatter_tensor(mine.view(-1), by_rank.view(-1), group=ctx.group)
        return mine, None
