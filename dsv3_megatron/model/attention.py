"""Core attention of the torch backend: softmax(q k^T * scale) v, causal, inside documents where they are isolated.

Which document each token belongs to comes as megatron-core's ``attention_mask``: of all that a layer is given it is
the one thing that reaches every attention, multi-token prediction's too, through plain and overlapped passes and
through recomputation alike. RoPE needs no restart at a document: scores depend on differences of positions only.

Shapes: S sequence on this rank, B microbatch, H heads on this rank, Q width of q and k, V width of v.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from dsv3_megatron.model.attention_cache import OutputCache


class CoreAttention(MegatronModule):
    """torch's fused attention behind the interface megatron-core expects.

    Takes MLA's unequal widths (Q 192, V 128 in DeepSeek-V3), context parallelism and packed documents.
    """

    output_cache = "high"  # set by the precision policy: what is kept of the output for backward

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
        only; returns [S, H, V]. The mask is always causal. ``attention_mask``: None, or the documents [B, S of
        the whole sequence] int32, non-decreasing, whose tokens attend to their own document only.
        """
        dropout = self.dropout if self.training else 0.0
        if packed_seq_params is not None:
            return self._documents(query, key, value, packed_seq_params.cu_seqlens_q.diff().tolist(), dropout)
        one_copy = self.output_cache != "high" and torch.is_grad_enabled()
        cache = OutputCache(self.output_cache) if one_copy else None
        mask = None
        if self.cp_group is not None and self.cp_group.size() > 1:
            positions = _zigzag_positions(query.shape[0], self.cp_group.rank(), self.cp_group.size(), query.device)
            mask = torch.arange(query.shape[0] * self.cp_group.size(), device=query.device) <= positions.unsqueeze(1)
            if attention_mask is not None:
                documents = attention_mask
                mask = mask & (documents[:, positions].unsqueeze(2) == documents.unsqueeze(1)).unsqueeze(1)
            key, value = (_GatherSequence.apply(x, self.cp_group) for x in (key, value))
        elif attention_mask is not None:
            rows = [
                self._documents(query[:, b], key[:, b], value[:, b], _lengths(attention_mask[b]), dropout)
                for b in range(query.shape[1])
            ]
            flat = torch.stack(rows, dim=1).flatten(2)
            return cache.keep(None, flat) if cache else flat
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        with cache.watch() if cache else nullcontext():
            out = _fused_attention(query, key, value, mask, self.softmax_scale, dropout)
        flat = out[..., : value.shape[-1]].permute(2, 0, 1, 3).flatten(2)
        return cache.keep(out, flat) if cache else flat

    def _documents(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int], dropout: float) -> Tensor:
        """Attend document by document: no pair of tokens of two documents is ever computed. [S, H, .] -> [S, H, V]."""
        outs = []
        for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths)):
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            out = _fused_attention(q, k, v, None, self.softmax_scale, dropout)[..., : v.shape[-1]]
            outs.append(out.squeeze(0).transpose(0, 1))
        return torch.cat(outs)


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, dropout: float
) -> Tensor:
    """Return [B, H, S, V or wider], causal where there is no mask; what is wider than V is zeros.

    A CPU's fused attention wants one width, else torch forms all S x S probabilities and keeps them: values are padded
    with zeros there, which come out as zeros.
    """
    if value.device.type == "cpu" and (missing := query.shape[-1] - value.shape[-1]) > 0:
        value = F.pad(value, (0, missing))
    causal = mask is None
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, dropout_p=dropout
    )


def _lengths(documents: Tensor) -> list[int]:
    """Return the lengths of the documents [S] of a sequence, in order."""
    return torch.unique_consecutive(documents, return_counts=True)[1].tolist()


def _zigzag_positions(length: int, rank: int, size: int, device: torch.device) -> Tensor:
    """Return [S]: where in the whole sequence a rank's tokens are.

    A rank holds pieces ``rank`` and ``2 * size - 1 - rank`` of the sequence's 2 * size, so that every rank has the
    same causal work.
    """
    half = length // 2
    pieces = (rank, 2 * size - 1 - rank)
    return torch.cat([torch.arange(p * half, (p + 1) * half, device=device) for p in pieces])


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
