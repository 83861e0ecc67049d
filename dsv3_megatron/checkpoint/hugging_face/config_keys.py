"""Every key of a published config.json that is known here: read, harmless, or refused unless it says what we compute.

A key in none of the tables is told by import_hf: it is not used, and somebody should know.
"""

from __future__ import annotations

from typing import Any

from dsv3_megatron.model.settings import ModelSettings

# Two names of one value: older and newer files, and transformers' attribute_map.
ALIASES = {
    "num_mtp_layers": "num_nextn_predict_layers",
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
}
# What follows from other keys, and must agree with them.
DERIVED = ("head_dim", "qk_head_dim", "num_key_value_heads", "mlp_layer_types")
ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")
# Fields of ModelSettings that no config.json has: ours alone.
OURS = frozenset({"capacity_factor", "freeze"})

READ = frozenset(
    {
        *(set(ModelSettings.model_fields) - OURS),
        *ALIASES,
        *DERIVED,
        *ROPE,
        "architectures",
        "text_config",
        "dtype",
        "torch_dtype",
        "quantization_config",
    }
)

# key or prefix* -> the values that change nothing here (null always does), and why others are refused
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "index_*": ((), "sparse attention is not built"),
    "indexer_*": ((), "sparse attention is not built"),
    "zero_expert_*": ((0,), "experts that compute nothing are not built"),
    "mla_scale_*": ((False,), "scaled latents are not built"),
    "linear_attn_config": (({},), "linear attention is not built"),
    "mla_use_nope": ((False,), "attention without positions is not built"),
    "compress_*": ((), "compressed attention is not built"),
    "hc_*": ((), "hyper-connections are not built"),
    "o_groups": ((), "a grouped output projection is not built"),
    "o_lora_rank": ((), "a low-rank output projection is not built"),
    "num_hash_layers": ((0,), "routing by hashes is not built"),
    "n_hash_layers": ((0,), "routing by hashes is not built"),
    "swiglu_*": ((0, 0.0), "a limited SwiGLU is not built"),
    "sliding_window": ((0,), "a sliding window is not built"),
    "use_sliding_window": ((False,), "a sliding window is not built"),
    "attention_chunk_size": ((), "chunked attention is not built"),
    "attn_output_gate": ((False,), "a gate on attention's output is not built"),
    "hidden_act": (("silu", "swish"), "only SwiGLU is built"),
    "attention_bias": ((False,), "linear layers have no bias here"),
    "mlp_bias": ((False,), "linear layers have no bias here"),
    "attention_dropout": ((0, 0.0), "nothing is dropped in training here; set it to 0 to train without"),
    "hidden_dropout": ((0, 0.0), "nothing is dropped in training here; set it to 0 to train without"),
    "moe_layer_freq": ((1,), "every layer after the dense ones has experts here"),
    "rope_interleave": ((True,), "rotary dimensions lie in pairs here"),
    "partial_rotary_factor": ((1, 1.0), "all of qk_rope_head_dim is turned here"),
    "tie_word_embeddings": ((False,), "embedding and head are two matrices here"),
    "attn_logit_softcapping": ((), "logits are not capped here"),
    "final_logit_softcapping": ((), "logits are not capped here"),
    "llama_4_scaling": ((), "queries are not scaled by their position here"),
    "add_cross_attention": ((False,), "there is no cross-attention here"),
    "is_encoder_decoder": ((False,), "there is no encoder here"),
    "pruned_heads": (({},), "every head is there here"),
    **dict.fromkeys(
        ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling", "logit_scale",
         "scale_emb", "scale_depth", "dim_model_base"),
        ((1, 1.0), "scaled activations are not built"),
    ),
}  # fmt: skip

_TEXT = "what a text begins, ends and is padded with is the tokenizer's"
_SAMPLING = "how text is sampled"
_TRAINED = "a weight of a training loss; the recipe has its own"
_OUTPUTS = "what a call returns"
_OLD = "transformers wrote it into every file"
HARMLESS: dict[str, str] = {
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id"), _TEXT),
    **dict.fromkeys(("tokenizer_class", "prefix", "decoder_start_token_id"), _TEXT),
    **dict.fromkeys(
        ("bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
         "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id",
         "forced_eos_token_id", "length_penalty", "max_length", "max_new_tokens", "min_length", "no_repeat_ngram_size",
         "num_beam_groups", "num_beams", "num_return_sequences", "remove_invalid_values", "repetition_penalty",
         "suppress_tokens", "temperature", "top_k", "top_p", "typical_p"),
        _SAMPLING,
    ),
    **dict.fromkeys(("aux_loss_alpha", "seq_aux", "router_aux_loss_coef", "router_z_loss_coef"), _TRAINED),
    **dict.fromkeys(
        ("output_attentions", "output_hidden_states", "output_router_logits", "output_scores", "return_dict",
         "return_dict_in_generate", "use_cache", "keys_to_ignore_at_inference"),
        _OUTPUTS,
    ),
    **dict.fromkeys(
        ("_name_or_path", "transformers_version", "auto_map", "chunk_size_feed_forward", "cross_attention_hidden_size",
         "finetuning_task", "id2label", "label2id", "num_labels", "is_decoder", "problem_type", "task_specific_params",
         "tf_legacy_loss", "torchscript", "use_bfloat16", "tie_encoder_decoder"),
        _OLD,
    ),
    **dict.fromkeys(("ep_size", "pretraining_tp"), "how its training was spread over ranks"),
    **dict.fromkeys(("_attn_implementation", "attn_implementation", "experts_implementation"), "which kernels compute"),
}  # fmt: skip
# Beside ``text_config``: of its other models, or read at both places.
AROUND = frozenset(
    {"text_config", "architectures", "model_type", "dtype", "torch_dtype", "quantization_config", "tie_word_embeddings",
     "vision_config", "audio_config", "ignore_index", "media_placeholder_token_id", "image_token_id", "video_token_id",
     "image_token_index", "vision_start_token_id", "vision_end_token_id", "projection_hidden_size",
     "projection_layer_norm_eps", "use_unified_vision_chunk", "video_placeholder", "projector_hidden_act"}
)  # fmt: skip


def refusal(key: str) -> tuple[tuple[Any, ...], str] | None:
    """Return the values of a key that change nothing, and why others are refused; None where it is not refused."""
    if key in REFUSED:
        return REFUSED[key]
    return next((rule for name, rule in REFUSED.items() if name.endswith("*") and key.startswith(name[:-1])), None)


def is_known(key: str) -> bool:
    """Return whether a key is read, harmless or checked."""
    return key in READ or key in HARMLESS or refusal(key) is not None


def shown(value: object) -> str:
    """Return a value of a configuration as a message quotes it, shortened."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
