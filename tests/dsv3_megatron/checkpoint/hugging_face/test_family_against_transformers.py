"""Every class of the family beside transformers' own: the same logits and gradients, there and back.

transformers' configuration classes write the config.json, its models compute: code that nobody here wrote.
"""

import json
from functools import cache

import pytest
import torch

from dsv3_megatron.checkpoint.hugging_face.config import config_from_settings, settings_from_config
from dsv3_megatron.checkpoint.hugging_face.families import FAMILIES
from dsv3_megatron.checkpoint.hugging_face.names import from_hugging_face
from dsv3_megatron.inference.trained_model import trained_model
from dsv3_megatron.model.backend import TorchBackend
from dsv3_megatron.model.config import transformer_config
from dsv3_megatron.model.settings import ModelSettings
from dsv3_megatron.model.stage import build_stage, forward_logits
from launcher import export_hf, import_hf
from launcher.command_line.compose import compose, load_resolved, resolved_yaml
from parallel.layout import Layout
from parallel.settings import ParallelSettings
from testing.training.tiny import SMALL

SHAPE = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 24, "n_routed_experts": 8, "num_experts_per_tok": 3,
}  # fmt: skip
V3 = SHAPE | {"model_type": "deepseek_v3", "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2}
GLM = SHAPE | {"model_type": "glm4_moe_lite"}
V2 = SHAPE | {"model_type": "deepseek_v2", "first_k_dense_replace": 1}
GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}


def yarn(**keys):
    """Rotary parameters that stretch a sequence of the test from inside."""
    given = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0} | keys
    return {"rope_parameters": {key: value for key, value in given.items() if value != "absent"}}


CASES = {
    "deepseek_v3": V3,
    "deepseek_v3, weights not normalised": V3 | {"norm_topk_prob": False},
    "deepseek_v3, one expert a token": V3 | {"num_experts_per_tok": 1},
    "deepseek_v3, one expert a token, not normalised": V3 | {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "deepseek_v3, another epsilon and full-rank queries": V3 | {"rms_norm_eps": 1e-3, "q_lora_rank": None},
    "deepseek_v3, another epsilon": V3 | {"rms_norm_eps": 1e-2},
    "deepseek_v3, YaRN without scales": V3 | yarn(),
    "deepseek_v3, YaRN with both scales": V3 | yarn(mscale=0.707, mscale_all_dim=1.3),
    "deepseek_v3, YaRN with every dimension stretched by another factor": V3
    | yarn(original_max_position_embeddings=512, rope_theta=100.0, mscale=1.0, mscale_all_dim=1.0),
    "deepseek_v3, YaRN with mscale alone": V3 | yarn(mscale=0.707),
    "deepseek_v3, YaRN with mscale_all_dim alone": V3 | yarn(mscale_all_dim=0.707),
    "deepseek_v3, YaRN with mscale_all_dim of zero": V3 | yarn(mscale=0.707, mscale_all_dim=0),
    "deepseek_v3, YaRN with a factor of attention": V3 | yarn(attention_factor=1.5, mscale_all_dim=0.707),
    "deepseek_v3, YaRN without original positions": V3
    | yarn(original_max_position_embeddings="absent")
    | {"max_position_embeddings": 32},
    "deepseek_v3, YaRN with Kimi-K2's betas": V3 | yarn(beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0),
    "deepseek_v3, YaRN of other places": V3
    | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, "rope_theta": 50000.0},
    "glm4_moe_lite": GLM | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "glm4_moe_lite, groups and weights not normalised": GLM | {"n_group": 4, "topk_group": 2, "norm_topk_prob": False},
    "glm4_moe_lite, YaRN": GLM | yarn(),
    "deepseek_v2": V2,
    "deepseek_v2, groups": V2 | GROUPS | {"routed_scaling_factor": 4.0},
    "deepseek_v2, one group of each expert": V2 | GROUPS | {"n_group": 8, "topk_group": 4},
    "deepseek_v2, YaRN as published": V2 | yarn(mscale=0.707, mscale_all_dim=0.707) | {"q_lora_rank": None},
}
EVERY_DIMENSION = "deepseek_v3, YaRN with every dimension stretched by another factor"
EACH = ["deepseek_v3, weights not normalised", "glm4_moe_lite", "deepseek_v2, groups"]
TOKENS = torch.arange(2 * 96).view(2, 96) * 7 % 251


def classes(model_type):
    """Return transformers' configuration and model class of a family."""
    import transformers  # seconds, which collecting tests need not take

    model = getattr(transformers, FAMILIES[model_type].architecture)
    return model.config_class, model


def drawn(model):
    """Draw all weights anew, norms and biases too; latents small, so that the epsilon of their norms matters."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.003 if "_a_proj" in name else 0.1)
        for name, buffer in model.named_buffers():
            if "e_score" in name:
                buffer.normal_(0.0, 0.05)
    return model.eval().float()


@cache
def theirs_of(name):
    """Return transformers' model of a case, and its logits and gradients [by name of ours]."""
    torch.manual_seed(len(name))
    configuration, causal_lm = classes(CASES[name]["model_type"])
    keys = {key: value for key, value in CASES[name].items() if key != "model_type"}
    model = drawn(causal_lm(configuration(**json.loads(json.dumps(keys)))))
    logits = model(TOKENS).logits
    loss_of(logits).backward()
    state = model.state_dict() | {
        key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in model.named_parameters()
    }
    return model, logits.detach(), from_hugging_face(state, settings_from_config(written_by(model)))


def written_by(model):
    """Return what transformers writes into config.json."""
    return json.loads(model.config.to_json_string())


def loss_of(logits):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


def ours_of(model, state, groups):
    """Return our main model with transformers' weights."""
    model = model.model_copy(update={"num_nextn_predict_layers": 0})
    config = transformer_config(model, ParallelSettings(), Layout(), balance_weight=0.0)
    stages = {"stage": 0, "layers_of_stages": (model.num_hidden_layers,), "sequence_length": TOKENS.shape[1]}
    ours = build_stage(config, model, TorchBackend(), **stages, groups=groups)
    missing = ours.load_state_dict(from_hugging_face(state, model), strict=False)
    assert not missing.unexpected_keys and all(key.endswith("_extra_state") for key in missing.missing_keys)
    return ours


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_equal_transformers(name, one_process):
    theirs, expected, gradients = theirs_of(name)
    ours = ours_of(settings_from_config(written_by(theirs)), theirs.state_dict(), one_process)
    logits = ours.eval()(TOKENS, torch.arange(TOKENS.shape[1]).expand_as(TOKENS), None)
    difference = (logits - expected).abs().max().item()
    assert difference < 1e-4, f"largest difference {difference:.2e} of |logit| up to {expected.abs().max():.1f}"
    loss_of(logits).backward()
    for key, parameter in ours.named_parameters():
        wanted = gradients[key]
        got = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        error = (got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12)
        # With one normalised expert a token the gate has no gradient but rounding.
        assert error < 1e-4 or wanted.abs().max() < 1e-8, f"{key}: {error:.2e} of {wanted.abs().max():.2e}"


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("deepseek_v3", {"norm_topk_prob": False}),
        ("deepseek_v3", {"n_group": 2}),
        ("deepseek_v3", {"topk_group": 3}),
        ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
        ("deepseek_v3", {"topk_method": "group_limited_greedy"}),
        ("deepseek_v3", {"num_experts_per_tok": 2}),
        ("deepseek_v3", {"routed_scaling_factor": 2.4}),
        ("deepseek_v3", {"rope_theta": 20000.0}),
        ("deepseek_v3", {"rms_norm_eps": 1e-3}),
        ("deepseek_v3, YaRN with both scales", {"mscale": 1.0}),
        ("deepseek_v3, YaRN with both scales", {"mscale_all_dim": 1.0}),
        (EVERY_DIMENSION, {"factor": 5.0}),
        (EVERY_DIMENSION, {"beta_fast": 2.0}),
        (EVERY_DIMENSION, {"beta_slow": 20.0}),
        (EVERY_DIMENSION, {"original_max_position_embeddings": 64}),
        ("deepseek_v3, YaRN without scales", {"mscale_all_dim": 1.0}),
        ("deepseek_v3, one expert a token", {"norm_topk_prob": False}),
        ("glm4_moe_lite", {"norm_topk_prob": False}),
        ("deepseek_v2, groups", {"norm_topk_prob": True}),
        ("deepseek_v2, groups", {"topk_method": "noaux_tc"}),
        ("deepseek_v2, groups", {"scoring_func": "sigmoid"}),
        ("deepseek_v2, groups", {"n_group": 1, "topk_group": 1, "topk_method": "greedy"}),
    ],
    ids=str,
)
def test_a_wrong_setting_is_seen(name, wrong, one_process):
    theirs, expected, _ = theirs_of(name)
    model = settings_from_config(written_by(theirs))
    rope = {
        key: value
        for key, value in wrong.items()
        if model.rope_scaling and key in type(model.rope_scaling).model_fields
    }
    changed = {"rope_scaling": model.rope_scaling.model_copy(update=rope)} if rope else wrong
    state = theirs.state_dict()
    ours = ours_of(ModelSettings.model_validate(model.model_copy(update=changed).model_dump()), state, one_process)
    assert (forward_logits(ours, TOKENS) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", EACH)
def test_a_model_that_transformers_saved_comes_back_as_its_class(name, tmp_path):
    theirs, expected, _ = theirs_of(name)
    theirs.save_pretrained(tmp_path / "saved")
    recipe = compose([*SMALL, f"data.sequence_length={TOKENS.shape[1]}"])
    (tmp_path / "rest.yaml").write_text(resolved_yaml(recipe))
    words = [f"input={tmp_path / 'saved'}", f"recipe={tmp_path / 'rest.yaml'}", f"output={tmp_path / 'run'}"]
    assert import_hf.main([*words, "processes=1"]) == 0
    imported = load_resolved(tmp_path / "run" / "recipe.yaml")
    assert imported.model.model_type == CASES[name]["model_type"] and imported.precision.name == "fp32"
    with trained_model(imported, tmp_path / "run") as model:
        logits = forward_logits(model.parts.whole_model, TOKENS)
    assert (logits - expected).abs().max() < 1e-4

    words = [f"run={tmp_path / 'run'}", f"output={tmp_path / 'exported'}", "dtype=fp32", "processes=1"]
    assert export_hf.main(words) == 0
    _, causal_lm = classes(CASES[name]["model_type"])
    back, facts = causal_lm.from_pretrained(tmp_path / "exported", dtype=torch.float32, output_loading_info=True)
    assert type(back) is type(theirs) and not facts["missing_keys"] and not facts["unexpected_keys"]
    with torch.no_grad():
        assert (back.eval()(TOKENS).logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("model_type", FAMILIES)
def test_absent_keys_mean_what_the_class_means_by_them(model_type):
    configuration, _ = classes(model_type)
    needed = {"num_experts_per_tok": 6, "moe_intermediate_size": 1408} if model_type == "deepseek_v2" else {}
    theirs = configuration(**needed)
    ours = settings_from_config({"model_type": model_type, **needed})
    assert ours == settings_from_config(json.loads(theirs.to_json_string()) | {"model_type": model_type})
    for field in type(ours).model_fields:
        if field in ("model_type", "rope_scaling", "rope_theta", "n_group", "topk_group") or not hasattr(theirs, field):
            continue
        assert getattr(ours, field) == getattr(theirs, field), field
    assert (ours.n_group, ours.topk_group) == (
        getattr(theirs, "n_group", 1) or 1,
        getattr(theirs, "topk_group", 1) or 1,
    )
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


def test_the_text_model_inside_a_multimodal_one_is_taken(one_process):
    from transformers import Kimi_K25Config

    theirs, expected, _ = theirs_of("deepseek_v3")
    text = written_by(theirs) | {"model_type": "kimi_k2"}
    wrapper = json.loads(
        Kimi_K25Config(text_config=json.loads(json.dumps(text)), tie_word_embeddings=False).to_json_string()
    )
    model = settings_from_config(wrapper)
    logits = forward_logits(ours_of(model, theirs.state_dict(), one_process), TOKENS)
    assert (logits - expected).abs().max() < 1e-4
    exported = config_from_settings(settings_from_config(wrapper | {"text_config": text}), "bf16", begin=0, end=1)
    assert exported["model_type"] == "kimi_k2" and "text_config" not in exported
