"""The shape of a model's attention, as whatever goes by heads needs it. No torch: asked by plans too."""

from __future__ import annotations

from dsv3_megatron.model.settings import ModelSettings
from dsv3_megatron.optim.matrices import Heads


def heads_of(model: ModelSettings) -> Heads:
    """Return how many heads the whole model has in a layer, and how wide their parts are."""
    return Heads(model.num_attention_heads, model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim)
