"""Core attention of the torch backend: softmax(q k^T * scale) v, causal, inside documents where they are isolated.

Which document each token belongs to comes as megatron-core's ``attention_mask``: of all that a layer is given it is
the one thing that reaches every attention, multi-token prediction's too, through plain and overlapped passes and
through recomputation alike. RoPE needs no restart at a document: scores depend on differences of positions only.

Shapes: S sequence on this rank, B microbatch, H heads on this rank, Q width of q and k, V width of v.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from dsv3_megatron.model.layers.attention_cache import OutputCache
from dsv3_megatron.model.layers.context import to_heads, to_pieces
from dsv3_megatron.model.layers.max_logits import MaxLogits


class CoreAttention(MegatronModule):
    """torch's fused attention behind the interface megatron-core expects.

    Takes MLA's unequal widths (Q 192, V 128 in DeepSeek-V3), context parallelism (by heads, model/layers/context.py)
    and packed documents.
    """

    output_cache: Literal["high", "once", "e5m6"] = (
        "high"  # set by the precision policy: what is kept of the output for backward
    )
    max_logits: MaxLogits | None = None  # set where the largest logits are wanted of training

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

    @property
    def inputs_recomputed(self) -> bool:
        """Whether query, key and value are computed again in backward (recompute ``mla_up``)."""
        selective = self.config.recompute_granularity == "selective"
        return selective and "mla_up_proj" in self.config.recompute_modules

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
        group = self.cp_group
        if group is None or group.size() == 1:
            cache = OutputCache(self.output_cache)
            return cache.keep(*self._attend(query, key, value, attention_mask, dropout, cache))
        (q, k, v), recomputed = self._over_heads(query, key, value, group)
        cache = OutputCache(self.output_cache, lambda kept: to_heads(kept, group))
        out, heads = self._attend(q, k, v, attention_mask, dropout, cache)
        if recomputed is not None:
            recomputed.discard_output_and_register_recompute(heads)
        return cache.keep(out, to_pieces(heads, group))

    def _over_heads(
        self, query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup
    ) -> tuple[tuple[Tensor, ...], CheckpointWithoutOutput | None]:
        """Exchange for the whole sequence with fewer heads. Where the inputs are computed again in backward, so that
        attention need not keep them, they are exchanged again as well: the second result sees to it."""

        def exchange(*inputs: Tensor) -> tuple[Tensor, ...]:
            return tuple(to_heads(x, group) for x in inputs)

        if not self.inputs_recomputed or not torch.is_grad_enabled():
            return exchange(query, key, value), None
        recomputed = CheckpointWithoutOutput()
        return recomputed.checkpoint(exchange, query, key, value), recomputed

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        documents: Tensor | None,
        dropout: float,
        cache: OutputCache,
    ) -> tuple[Tensor | None, Tensor]:
        """Return the output as the fused kernel gave it (None where it ran document by document) and as [S, B, H, V].

        The sequence is whole and in order.
        """
        if documents is not None:
            rows = [
                self._documents(query[:, b], key[:, b], value[:, b], _lengths(documents[b]), dropout)
                for b in range(query.shape[1])
            ]
            return None, torch.stack(rows, dim=1)
        self._show_logits(query, key)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        with cache.watch():
            out = _fused_attention(query, key, value, self.softmax_scale, dropout)
        return out, out[..., : value.shape[-1]].permute(2, 0, 1, 3)

    def _documents(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int], dropout: float) -> Tensor:
        """Attend document by document: no pair of tokens of two documents is ever computed. [S, H, .] -> [S, H, V]."""
        outs = []
        for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths)):
            self._show_logits(q.unsqueeze(1), k.unsqueeze(1))
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            out = _fused_attention(q, k, v, self.softmax_scale, dropout)[..., : v.shape[-1]]
            outs.append(out.squeeze(0).transpose(0, 1))
        return torch.cat(outs)

    def _show_logits(self, query: Tensor, key: Tensor) -> None:
        """Let the largest logits be found of whole sequences, or documents, [S, B, heads of this CP rank, Q]."""
        if self.max_logits is not None and self.training:
            place = 0 if self.cp_group is None else self.cp_group.rank()
            self.max_logits.see(query, key, place * query.shape[2])


class CoreAttentionBesideTE(CoreAttention):
    """The same among Transformer Engine's layers: the linear layer after it keeps the output as it is, and attention
    keeps the same copy."""

    output_cache: Literal["high", "once", "e5m6"] = "once"


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout: float) -> Tensor:
    """Return [B, H, S, V or wider], causal; what is wider than V is zeros.

    A CPU's fused attention wants one width, else torch forms all S x S probabilities and keeps them: values are padded
    with zeros there, which come out as zeros.
    """
    if value.device.type == "cpu" and (missing := query.shape[-1] - value.shape[-1]) > 0:
        value = F.pad(value, (0, missing))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, dropout_p=dropout)


def _lengths(documents: Tensor) -> list[int]:
    """Return the lengths of the documents [S] of a sequence, in order."""
    return torch.unique_consecutive(documents, return_counts=True)[1].tolist()
