"""Names and shapes between Hugging Face's ``deepseek_v3`` and our modules, as one table.

Source: the published checkpoint's tensor names; transformers' DeepseekV3ForCausalLM.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3_megatron.model.settings import ModelSettings

LAYER = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "self_attn.q_proj": "self_attention.linear_q_proj",
    "self_attn.q_a_proj": "self_attention.linear_q_down_proj",
    "self_attn.q_a_layernorm": "self_attention.q_layernorm",
    "self_attn.q_b_proj": "self_attention.linear_q_up_proj",
    "self_attn.kv_a_proj_with_mqa": "self_attention.linear_kv_down_proj",
    "self_attn.kv_a_layernorm": "self_attention.kv_layernorm",
    "self_attn.kv_b_proj": "self_attention.linear_kv_up_proj",
    "self_attn.o_proj": "self_attention.linear_proj",
}
TOP = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "lm_head.weight": "output_layer.weight",
}


def from_hugging_face(state: dict[str, Tensor], model: ModelSettings) -> dict[str, Tensor]:
    """Return the main model's weights under our names, from transformers' state dict.

    Routed experts are taken stacked (``experts.gate_up_proj`` [E, 2I, D], ``experts.down_proj`` [E, D, I], as
    transformers 5 holds them) or one by one (as the published files hold them).
    """
    found = {ours: state[theirs] for theirs, ours in TOP.items()}
    for layer in range(model.num_hidden_layers):
        theirs, ours = f"model.layers.{layer}", f"decoder.layers.{layer}"
        for old, new in LAYER.items():
            if f"{theirs}.{old}.weight" in state:
                found[f"{ours}.{new}.weight"] = state[f"{theirs}.{old}.weight"]
        if layer < model.first_k_dense_replace:
            found |= _gated(state, f"{theirs}.mlp", f"{ours}.mlp")
            continue
        if model.n_shared_experts:
            found |= _gated(state, f"{theirs}.mlp.shared_experts", f"{ours}.mlp.shared_experts")
        found[f"{ours}.mlp.router.weight"] = state[f"{theirs}.mlp.gate.weight"]
        found[f"{ours}.mlp.router.expert_bias"] = state[f"{theirs}.mlp.gate.e_score_correction_bias"]
        gate_up, down = _experts(state, f"{theirs}.mlp.experts", model.n_routed_experts)
        found[f"{ours}.mlp.experts.linear_fc1.weight"] = gate_up
        found[f"{ours}.mlp.experts.linear_fc2.weight"] = down
    return found


def _gated(state: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    gate_up = torch.cat([state[f"{theirs}.gate_proj.weight"], state[f"{theirs}.up_proj.weight"]])
    return {f"{ours}.linear_fc1.weight": gate_up, f"{ours}.linear_fc2.weight": state[f"{theirs}.down_proj.weight"]}


def _experts(state: dict[str, Tensor], prefix: str, count: int) -> tuple[Tensor, Tensor]:
    if f"{prefix}.gate_up_proj" in state:
        return state[f"{prefix}.gate_up_proj"], state[f"{prefix}.down_proj"]
    layers = [_gated(state, f"{prefix}.{e}", "") for e in range(count)]
    return tuple(torch.stack([layer[f".linear_fc{i}.weight"] for layer in layers]) for i in (1, 2))
