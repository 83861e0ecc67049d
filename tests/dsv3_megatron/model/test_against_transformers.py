"""Logits equal transformers' DeepseekV3ForCausalLM with the same weights: code that nobody here wrote."""

import pytest
import torch

from dsv3_megatron.checkpoint.hugging_face.names import from_hugging_face
from dsv3_megatron.model.backend import TorchBackend
from dsv3_megatron.model.config import transformer_config
from dsv3_megatron.model.settings import ModelSettings
from dsv3_megatron.model.stage import build_stage, forward_logits
from parallel.layout import Layout
from parallel.settings import ParallelSettings

BASE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "num_nextn_predict_layers": 1,
}
YARN = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
CASES = {
    "as published": {},
    "two experts of two groups": {"num_experts_per_tok": 2},
    "sixteen experts": {"n_routed_experts": 16},
    "one group": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 3},
    "two shared experts": {"n_shared_experts": 2},
    "full-rank queries": {"q_lora_rank": None},
    "all layers MoE, other widths": {"first_k_dense_replace": 0, "v_head_dim": 24, "qk_nope_head_dim": 8},
    "YaRN of the released model": {"rope_scaling": YARN},
    "YaRN inside the sequence": {"rope_scaling": YARN | {"factor": 4.0, "original_max_position_embeddings": 32}},
    "YaRN with other scales": {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    "YaRN without a softmax scale": {"rope_scaling": YARN | {"mscale_all_dim": 0.0}},
}


def transformers_model(model: ModelSettings) -> torch.nn.Module:
    """Return transformers' model of the same shape, all weights (norms and biases too) drawn anew."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM  # seconds, which collecting tests need not take

    ours = {"topk_method", "scoring_func", "initializer_range", "freeze"}
    shape = model.model_dump(exclude={"rope_scaling", "rope_theta", *ours})
    rope = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling:
        rope |= model.rope_scaling.model_dump(exclude={"type"}) | {"rope_type": "yarn"}
    heads = model.num_attention_heads
    config = DeepseekV3Config(
        **shape, rope_parameters=rope, rope_interleave=True, num_key_value_heads=heads, attention_bias=False
    )
    found = DeepseekV3ForCausalLM(config).eval().float()
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
        for name, buffer in found.named_buffers():
            if "e_score" in name:
                buffer.normal_(0.0, 0.05)
    return found


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name, one_process):
    torch.manual_seed(len(name))
    model = ModelSettings(**BASE | CASES[name])
    theirs = transformers_model(model)
    config = transformer_config(model, ParallelSettings(), Layout())
    ours = build_stage(
        config,
        model,
        TorchBackend(),
        stage=0,
        layers_of_stages=(model.num_hidden_layers,),
        sequence_length=96,
        groups=one_process,
    )
    missing = ours.load_state_dict(from_hugging_face(theirs.state_dict(), model), strict=False)
    assert not missing.unexpected_keys
    assert all(key.startswith("mtp.") or key.endswith("_extra_state") for key in missing.missing_keys)

    tokens = torch.randint(0, model.vocab_size, (2, 96))
    with torch.no_grad():
        expected = theirs(tokens).logits
    difference = (forward_logits(ours, tokens) - expected).abs().max().item()
    assert difference < 1e-4, f"{name}: largest difference {difference:.2e} of |logit| up to {expected.abs().max():.1f}"
