"""What Transformer Engine keeps in place of weight gradients that it has added to the float32 buffer already. No torch.

autograd must be handed a gradient, and TE hands it one tensor that nobody reads for every shape of weight: weights of
the same shape share it, in all layers, for as long as the process lives (TE 2.20.2, module/base.py, get_dummy_wgrad).
Frozen weights are handed none.
"""

from __future__ import annotations

from collections.abc import Iterable

from dsv3_megatron.model.composition import composition
from dsv3_megatron.model.freeze import MTP
from dsv3_megatron.pipeline.split import layers_of_stages
from dsv3_megatron.recipe import Recipe
from parallel.layout import Layout


def placeholder_bytes(recipe: Recipe, layout: Layout, stages: Iterable[int]) -> int:
    """Return their bytes on a rank that holds ``stages``; 0 on another backend than te."""
    if recipe.backend != "te":
        return 0
    shapes = {shape for stage in stages for shape in _shapes(recipe, layout, stage)}
    return sum(rows * columns for rows, columns in shapes) * (2 if recipe.precision.parameters == "bf16" else 4)


def _shapes(recipe: Recipe, layout: Layout, stage: int) -> set[tuple[int, int]]:
    """Return the shapes of a stage's weights that TE multiplies with, as this rank holds them: (outputs, inputs)."""
    model, tp = recipe.model, layout.tp
    d, heads = model.hidden_size, model.num_attention_heads // tp
    query = heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)
    parts, freeze = composition(model, layers_of_stages(recipe), stage), model.freeze
    dense, moe = parts.dense > parts.frozen_dense, parts.moe > parts.frozen_moe  # is one of them trained?
    shapes: set[tuple[int, int]] = set()
    attention = {
        (query, model.q_lora_rank or d),
        (model.kv_lora_rank + model.qk_rope_head_dim, d),
        (heads * (model.qk_nope_head_dim + model.v_head_dim), model.kv_lora_rank),
        (d, heads * model.v_head_dim),
    }
    if model.q_lora_rank:
        attention.add((model.q_lora_rank, d))
    if (dense or moe) and "attention" not in freeze:
        shapes |= attention
    widths = []
    if dense and "dense" not in freeze:
        widths.append(model.intermediate_size // tp)
    if moe and "experts" not in freeze:
        widths.append(model.moe_intermediate_size // layout.expert_tp)
    if moe and model.n_shared_experts and "shared_experts" not in freeze:
        widths.append(model.n_shared_experts * model.moe_intermediate_size // tp)
    shapes |= {(2 * width, d) for width in widths} | {(d, width) for width in widths}
    if parts.mtp and MTP not in freeze:
        shapes.add((d // tp, 2 * d))
    return shapes
