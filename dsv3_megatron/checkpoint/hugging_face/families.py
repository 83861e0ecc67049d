"""The published classes whose mathematics is ours, by the ``model_type`` of their config.json.

What an absent key means differs from class to class. Source: the configuration classes of transformers 5.23
(``configuration_*.py``), which the tests compare; kimi_k2 and joyai_llm_flash are deepseek_v3 under names of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Absent keys of DeepseekV3Config mean ModelSettings' own defaults, and this: 0.006 is the value of training (4.2).
_V3_DEFAULTS = {"initializer_range": 0.02}
_GLM_DEFAULTS = {
    "vocab_size": 154880,
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 47,
    "first_k_dense_replace": 1,
    "num_attention_heads": 20,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "n_routed_experts": 64,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.8,
    "num_nextn_predict_layers": 0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 202752,
    "initializer_range": 0.02,
}
_V2_DEFAULTS = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "moe_intermediate_size": 1407,
    "num_hidden_layers": 32,
    "first_k_dense_replace": 0,
    "num_attention_heads": 32,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": None,  # the class has no default
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
}


@dataclass(frozen=True)
class Family:
    """A class of published models."""

    architecture: str
    defaults: dict[str, Any]  # what absent keys mean, where ModelSettings' defaults are not it
    gate: dict[str, tuple[Any, ...]]  # keys that the class takes for granted, and the values that agree with it
    new_places: bool = False  # rope_parameters and mlp_layer_types instead of rope_theta, rope_scaling, moe_layer_freq
    has_mtp: bool = True


_SIGMOID: dict[str, tuple[Any, ...]] = {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)}
_SOFTMAX: dict[str, tuple[Any, ...]] = {
    "scoring_func": ("softmax",),
    "topk_method": ("greedy", "group_limited_greedy"),
    "norm_topk_prob": (False,),  # transformers never normalises; the published code then leaves the scaling out
}
_V3 = Family("DeepseekV3ForCausalLM", _V3_DEFAULTS, _SIGMOID)

FAMILIES = {
    "deepseek_v3": _V3,
    "kimi_k2": _V3,
    "joyai_llm_flash": _V3,
    "glm4_moe_lite": Family("Glm4MoeLiteForCausalLM", _GLM_DEFAULTS, _SIGMOID, new_places=True),
    "deepseek_v2": Family("DeepseekV2ForCausalLM", _V2_DEFAULTS, _SOFTMAX, has_mtp=False),
}

# Relatives that are not in the family, and in what they differ: where their config.json does not give them away.
OUTSIDE = {
    "deepseek_v32": "has sparse attention (index_topk)",
    "glm_moe_dsa": "has sparse attention (index_topk)",
    "deepseek_v4": "has compressed attention and hyper-connections (compress_rates, hc_mult)",
    "longcat_flash": "has experts that compute nothing and scaled latents (zero_expert_num, mla_scale_q_lora)",
    "kimi_linear": "has linear attention (linear_attn_config)",
    "axk1": "has a norm after every MoE block (post_mlp_layernorm)",
    "youtu": "has no experts, and one matrix for embedding and head (tie_word_embeddings)",
}
