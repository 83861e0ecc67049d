"""ModelSettings -> megatron-core's configuration. The one place where their names meet ours."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor

from dsv3_megatron.model.settings import ModelSettings
from parallel.layout import Layout
from parallel.settings import ParallelSettings

RECOMPUTE = {
    "norm": "layernorm",
    "mla_up": "mla_up_proj",
    "attention": "core_attn",
    "moe_act": "moe_act",
    "shared_experts": "shared_experts",
    "mlp": "mlp",
    "moe": "moe",
}


def transformer_config(
    model: ModelSettings,
    parallel: ParallelSettings,
    layout: Layout,
    *,
    dtype: torch.dtype = torch.float32,
    mtp_weight: float = 0.3,
    balance_weight: float = 1e-4,
) -> MLATransformerConfig:
    """Return megatron-core's configuration of the model on this layout.

    It knows nothing of pipeline stages: each is a model of its own to megatron-core, and our engine joins them.
    ``mtp_weight`` and ``balance_weight`` are the values at the start: they are phases, and the trainer sets the
    configuration's fields before every step.
    """
    config = MLATransformerConfig(
        **_shape(model),
        **_routing(model, balance_weight),
        **_rope(model),
        mtp_num_layers=model.num_nextn_predict_layers or None,
        mtp_loss_scaling_factor=mtp_weight,
        # Modules allocate; initialise.py draws, so that weights do not depend on the layout.
        init_method=_leave,
        output_layer_init_method=_leave,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.tp > 1,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.expert_tp,
        # Losses are summed, and gradients divided once by the tokens of the whole step: the same in every layout.
        calculate_per_token_loss=True,
        **_recompute(parallel.recompute),
    )
    if model.topk_method == "capacity":
        config.moe_expert_capacity_factor = model.capacity_factor  # the constructor takes it for its own dropping
    config.moe_grouped_gemm = True  # set after construction: the constructor takes it for TE's or grouped_gemm's
    if "moe_act" in parallel.recompute and config.recompute_granularity != "full":
        config.recompute_granularity = "selective"
        # All of them: left alone, megatron-core's list has its default, the core attention, in it.
        config.recompute_modules = [RECOMPUTE[name] for name in parallel.recompute]
    return config


def _leave(weight: Tensor) -> Tensor:
    return weight


def _shape(model: ModelSettings) -> dict[str, object]:
    return {
        "num_layers": model.num_hidden_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "q_lora_rank": model.q_lora_rank,
        "kv_lora_rank": model.kv_lora_rank,
        "qk_head_dim": model.qk_nope_head_dim,
        "qk_pos_emb_head_dim": model.qk_rope_head_dim,
        "v_head_dim": model.v_head_dim,
        "ffn_hidden_size": model.intermediate_size,
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.rms_norm_eps,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        # Fusions are CUDA kernels; TE brings its own.
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
    }


def _routing(model: ModelSettings, balance_weight: float) -> dict[str, object]:
    biased = model.topk_method == "noaux_tc" and model.scoring_func == "sigmoid"
    grouped = model.n_group > 1
    return {
        "num_moe_experts": model.n_routed_experts,
        "moe_ffn_hidden_size": model.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": model.n_shared_experts * model.moe_intermediate_size or None,
        "moe_layer_freq": [0] * model.first_k_dense_replace + [1] * model.num_moe_layers,
        "moe_router_topk": model.num_experts_per_tok,
        "moe_router_num_groups": model.n_group if grouped else None,
        "moe_router_group_topk": model.topk_group if grouped else None,
        "moe_router_topk_scaling_factor": model.routed_scaling_factor,
        "moe_router_score_function": model.scoring_func,
        "moe_router_enable_expert_bias": biased,
        "moe_router_bias_update_rate": 0.0,  # the trainer updates the bias itself
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": balance_weight,
        "moe_token_dispatcher_type": "alltoall",
    }


def _rope(model: ModelSettings) -> dict[str, object]:
    """Without scaling plain RoPE at every length; with it YaRN at every length, as transformers does."""
    scaling = model.rope_scaling
    if scaling is None:
        # mscale_all_dim 0: megatron-core scales the softmax by it even under plain RoPE.
        values = {"rope_type": "rope", "rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
    else:
        values = {
            "rope_type": "yarn",
            "rotary_scaling_factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "mscale": scaling.mscale,
            "mscale_all_dim": scaling.mscale_all_dim,
        }
    return {**values, "rotary_base": model.rope_theta, "rotary_interleaved": False}  # MLA de-interleaves by itself


def _recompute(names: tuple[str, ...]) -> dict[str, object]:
    if "full" in names:
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    modules = [RECOMPUTE[name] for name in names if name != "moe_act"]  # moe_act: set after construction
    return {"recompute_granularity": "selective", "recompute_modules": modules} if modules else {}
