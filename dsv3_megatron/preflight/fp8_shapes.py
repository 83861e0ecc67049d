"""Do the shapes of a recipe divide as FP8 products on a GPU need? Asked before anything starts.

cuBLAS's block-scaled products want the summed dimension in multiples of 16, the others in multiples of 8 or 16; wgrad
sums over tokens. Experts' tokens are padded by megatron-core. The emulation takes any shape.
"""

from __future__ import annotations

from collections.abc import Iterator

from dsv3_megatron.recipe import Recipe
from parallel.errors import LayoutError

MULTIPLE = 16


def check_shapes(recipe: Recipe) -> None:
    """Raise LayoutError naming the first dimension of a linear layer that is not a multiple of 16."""
    for name, value in dimensions(recipe):
        if value % MULTIPLE:
            near = max(MULTIPLE, round(value / MULTIPLE) * MULTIPLE)
            raise LayoutError(
                f"{name} = {value} is not a multiple of {MULTIPLE}, which precision=fp8 on a GPU needs; nearest that "
                f"is: {near}, or set precision=bf16"
            )


def dimensions(recipe: Recipe) -> Iterator[tuple[str, int]]:
    """Yield every width that a product of a linear layer has on one rank, and its tokens, with the recipe's words."""
    model, parallel, tp = recipe.model, recipe.parallel, recipe.parallel.tensor
    heads = model.num_attention_heads // tp
    query_key = model.qk_nope_head_dim + model.qk_rope_head_dim
    yield "model.hidden_size", model.hidden_size
    if model.q_lora_rank:
        yield "model.q_lora_rank", model.q_lora_rank
    yield "model.kv_lora_rank", model.kv_lora_rank
    yield "model.kv_lora_rank + model.qk_rope_head_dim", model.kv_lora_rank + model.qk_rope_head_dim
    over = f" / parallel.tensor {tp}" if tp > 1 else ""
    yield f"model.num_attention_heads x (qk_nope_head_dim + qk_rope_head_dim){over}", heads * query_key
    yield f"model.num_attention_heads x v_head_dim{over}", heads * model.v_head_dim
    if model.first_k_dense_replace:
        yield f"model.intermediate_size{over}", model.intermediate_size // tp
    if model.num_moe_layers:
        etp = parallel.expert_tensor
        over_etp = f" / parallel.expert_tensor {etp}" if etp > 1 else ""
        yield f"model.moe_intermediate_size{over_etp}", model.moe_intermediate_size // etp
        if model.n_shared_experts:
            yield (
                f"model.n_shared_experts x moe_intermediate_size{over}",
                (model.n_shared_experts * model.moe_intermediate_size // tp),
            )
    tokens = recipe.data.sequence_length // parallel.context * recipe.optim.micro_batch
    yield "tokens of a microbatch (data.sequence_length / parallel.context x optim.micro_batch)", tokens
