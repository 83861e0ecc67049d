"""Which configurations are read, as what, and by which key another one is refused."""

import json
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.checkpoint.hugging_face import config_keys
from dsv3_megatron.checkpoint.hugging_face.config import config_from_settings, settings_from_config, told_by_config
from dsv3_megatron.checkpoint.hugging_face.families import FAMILIES, OUTSIDE
from dsv3_megatron.model.settings import ModelSettings, RopeScaling
from launcher import import_hf
from parallel.errors import CheckpointError, RecipeError
from testing.lanes import examples

# Shapes as published, cut down; every key that the published files have.
V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "bos_token_id": 0, "eos_token_id": 1,
    "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02,
    "intermediate_size": 96, "kv_lora_rank": 16, "max_position_embeddings": 640, "model_type": "deepseek_v3",
    "moe_intermediate_size": 32, "moe_layer_freq": 1, "n_group": 4, "n_routed_experts": 16, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 4, "num_experts_per_tok": 4, "num_hidden_layers": 4,
    "num_key_value_heads": 4, "num_nextn_predict_layers": 1, "q_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "rms_norm_eps": 1e-06, "rope_theta": 10000,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 16, "type": "yarn"},
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 2,
    "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": True,
    "v_head_dim": 16, "vocab_size": 128,
}  # fmt: skip
MOONLIGHT = V3 | {
    "aux_loss_alpha": 0.001, "seq_aux": True, "pretraining_tp": 1, "q_lora_rank": None, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 2, "rms_norm_eps": 1e-05, "rope_theta": 50000.0, "rope_scaling": None,
    "num_nextn_predict_layers": 0,
}  # fmt: skip
KIMI = MOONLIGHT | {
    "model_type": "kimi_k2", "q_lora_rank": 32, "routed_scaling_factor": 2.827,
    "rope_scaling": V3["rope_scaling"] | {"beta_fast": 1.0, "factor": 32.0},
}  # fmt: skip
KIMI_25 = {
    "architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "bos_token_id": 3,
    "dtype": "bfloat16", "eos_token_id": 4, "ignore_index": -100, "media_placeholder_token_id": 5, "pad_token_id": 6,
    "text_config": KIMI | {"dtype": "bfloat16", "num_beams": 1, "pruned_heads": {}, "is_encoder_decoder": False,
                           "quantization_config": {"quant_method": "compressed-tensors"}},
    "tie_word_embeddings": False, "vision_config": {"patch_size": 14}, "use_unified_vision_chunk": True,
}  # fmt: skip
JOYAI = V3 | {"model_type": "joyai_llm_flash", "n_group": 1, "topk_group": 1, "rope_theta": 32000000}
GLM = {
    "architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite", "num_hidden_layers": 4,
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 96,
    "vocab_size": 128, "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4,
    "moe_intermediate_size": 32, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 24,
    "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 32, "routed_scaling_factor": 1.8,
    "eos_token_id": [120, 121, 122], "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "partial_rotary_factor": 1.0, "num_nextn_predict_layers": 1, "torch_dtype": "bfloat16",
}  # fmt: skip
V2 = MOONLIGHT | {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "scoring_func": "softmax",
    "norm_topk_prob": False, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
    "rope_scaling": V3["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707}, "routed_scaling_factor": 16.0,
}  # fmt: skip
SPARSE = {"index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048}
V32 = V3 | SPARSE | {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32"}
GLM_5 = GLM | SPARSE | {"architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa"}
LONGCAT = V3 | {
    "architectures": ["LongcatFlashForCausalLM"], "model_type": "longcat_flash", "zero_expert_num": 256,
    "zero_expert_type": "identity", "mla_scale_q_lora": True, "mla_scale_kv_lora": True,
}  # fmt: skip
V4 = V3 | {"model_type": "deepseek_v4", "hc_mult": 4, "o_groups": 8, "compress_rates": {}, "swiglu_limit": 10.0}
LINEAR = V3 | {"model_type": "kimi_linear", "linear_attn_config": {"kda_layers": [1]}, "mla_use_nope": True}

ACCEPTED = {
    "DeepSeek-V3": (V3, "deepseek_v3"),
    "Moonlight": (MOONLIGHT, "deepseek_v3"),
    "Kimi-K2": (KIMI, "kimi_k2"),
    "Kimi-K2.5": (KIMI_25, "kimi_k2"),
    "a copy of it": (KIMI_25 | {"text_config": KIMI | {"model_type": "deepseek_v3"}}, "deepseek_v3"),
    "JoyAI-LLM-Flash": (JOYAI, "joyai_llm_flash"),
    "GLM-4.7-Flash": (GLM, "glm4_moe_lite"),
    "DeepSeek-V2": (V2, "deepseek_v2"),
    "DeepSeek-V2-Lite": (V2 | {"topk_method": "greedy", "n_group": 1, "topk_group": 1}, "deepseek_v2"),
}


def read(config):
    return settings_from_config(json.loads(json.dumps(config)))


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_published_configuration_is_read_and_goes_back_as_its_class(name):
    config, model_type = ACCEPTED[name]
    model = read(config)
    assert model.model_type == model_type
    told = told_by_config(config)
    assert told == (["config.json: only the text model under text_config is taken"] if "text_config" in config else [])
    text = config.get("text_config", config)
    back = config_from_settings(model, "bf16", begin=0, end=1)
    assert back["model_type"] == model_type and back["architectures"] == text["architectures"]
    assert read(back) == model and not told_by_config(back)
    for key in set(back) & set(text) - {"bos_token_id", "eos_token_id", "rope_scaling", "rope_parameters"}:
        assert back[key] == text[key], key


REFUSALS = [
    (V32, "index_head_dim"),
    (V32 | {"model_type": "deepseek_v3"}, "index_head_dim"),
    (V3 | {"index_topk": 2048}, "index_topk"),
    ({key: value for key, value in V32.items() if key not in SPARSE}, "model_type"),
    (V3 | {"architectures": V32["architectures"]}, "architectures"),
    (GLM_5, "index_head_dim"),
    (GLM_5 | {"model_type": "deepseek_v3"}, "index_head_dim"),
    (LONGCAT, "zero_expert_num"),
    (LONGCAT | {"model_type": "deepseek_v3", "zero_expert_num": 0, "zero_expert_type": None}, "mla_scale_q_lora"),
    (V4, "hc_mult"),
    (LINEAR, "linear_attn_config"),
    (V3 | {"model_type": "axk1", "architectures": ["AXK1ForCausalLM"]}, "model_type.*post_mlp_layernorm"),
    (V3 | {"model_type": "youtu", "architectures": ["YoutuForCausalLM"]}, "model_type.*no experts"),
    (V3 | {"model_type": "gigachat"}, "model_type.*write deepseek_v3"),
    (V3 | {"model_type": ["deepseek_v3"]}, "model_type"),
    (V3 | {"architectures": ["DeepseekV3ForSequenceClassification"]}, "architectures"),
    (V2 | {"model_type": "deepseek_v3", "architectures": V3["architectures"]}, "scoring_func"),
    (V2 | {"norm_topk_prob": True}, "norm_topk_prob"),
    (V2 | {"num_experts_per_tok": None}, "num_experts_per_tok"),
    (GLM | {"mlp_layer_types": 3, "first_k_dense_replace": None}, "mlp_layer_types"),
    (V3 | {"scoring_func": "softmax"}, "scoring_func"),
    (V3 | {"topk_method": "greedy"}, "topk_method"),
    (KIMI_25 | {"text_config": KIMI | {"index_topk": 1}}, "index_topk"),
    (KIMI_25 | {"text_config": KIMI | {"model_type": "deepseek_v32"}}, "model_type"),
    (KIMI_25 | {"tie_word_embeddings": True}, "tie_word_embeddings"),
    *((V3 | {key: value}, key) for key, value in {
        "hidden_act": "gelu", "attention_bias": True, "mlp_bias": True, "sliding_window": 4096, "moe_layer_freq": 2,
        "attention_dropout": 0.1, "tie_word_embeddings": True, "partial_rotary_factor": 0.5, "rope_interleave": False,
        "num_hash_layers": 3, "swiglu_limit": 7.0, "num_key_value_heads": 2, "head_dim": 16, "qk_head_dim": 16,
        "num_local_experts": 8, "num_mtp_layers": 3, "vocab_size": -1, "n_group": 7,
        "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 2,
    }.items()),
]  # fmt: skip


@pytest.mark.parametrize(("config", "named"), REFUSALS, ids=[named for _, named in REFUSALS])
def test_another_model_is_refused_by_the_key_that_differs(config, named):
    with pytest.raises((CheckpointError, RecipeError), match=named) as refused:
        read(config)
    assert "\n" not in str(refused.value)


ROPE_REFUSALS = {
    "rope_scaling.factor": {"rope_scaling": {"type": "yarn"}},
    "rope_type = 'linear'": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "rope_type = 'llama3'": {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
    "rope_type = 'dynamic'": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "rope_scaling": None},
    "rope_scaling.rope_type = 'linear' contradicts rope_scaling.type": {
        "rope_scaling": V3["rope_scaling"] | {"rope_type": "linear"}
    },
    "rope_theta = 10000 contradicts rope_parameters.rope_theta": {"rope_parameters": {"rope_theta": 500.0}},
    "rope_parameters.factor = 8 contradicts rope_scaling.factor": {"rope_parameters": {"factor": 8}},
    "original_max_position_embeddings = 64 contradicts": {"original_max_position_embeddings": 64},
    "truncate": {"rope_scaling": V3["rope_scaling"] | {"truncate": False}},
    "partial_rotary_factor": {"rope_parameters": {"partial_rotary_factor": 0.5}},
    "rope_scaling.llama_4_scaling_beta": {"rope_scaling": V3["rope_scaling"] | {"llama_4_scaling_beta": 0.1}},
    "rope_scaling.factor = '40'": {"rope_scaling": V3["rope_scaling"] | {"factor": "40"}},
    "kinds of layers": {"rope_parameters": {"full_attention": {"rope_theta": 10000}}},
    "factor = 40 has no meaning": {"rope_scaling": {"type": "default", "factor": 40}},
    "attention_factor": {"rope_scaling": {"type": "yarn", "factor": 1, "attention_factor": 2.0}},
    "rope_scaling = 'yarn' is no": {"rope_scaling": "yarn"},
}


@pytest.mark.parametrize("named", ROPE_REFUSALS)
def test_rope_that_is_not_built_or_contradicts_itself_is_refused(named):
    with pytest.raises(CheckpointError, match=named) as refused:
        read(V3 | ROPE_REFUSALS[named])
    assert "\n" not in str(refused.value)


def test_null_means_absent():
    nulls = dict.fromkeys(
        ("head_dim", "sliding_window", "index_topk", "hidden_act", "rope_theta", "norm_topk_prob", "n_group",
         "topk_group", "rope_parameters", "num_key_value_heads", "mlp_layer_types",
         "partial_rotary_factor", "num_mtp_layers")
    )  # fmt: skip
    assert read(MOONLIGHT | nulls | {"rope_theta": 50000.0}) == read(MOONLIGHT)
    assert read(MOONLIGHT | {"n_shared_experts": None}).n_shared_experts == 0
    assert read(MOONLIGHT).q_lora_rank is None


def test_both_places_may_say_the_same():
    both = {"rope_parameters": V3["rope_scaling"] | {"rope_type": "yarn", "rope_theta": 10000}, "num_local_experts": 16}
    assert read(V3 | both) == read(V3)
    kinds = {"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 2, "first_k_dense_replace": None}
    assert read(GLM | kinds).first_k_dense_replace == 2


def test_an_unknown_key_is_told_on_import(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(V3 | {"new_thing": {"a": [1] * 100}, "other": 2}))
    assert import_hf.main([f"input={tmp_path / 'config.json'}", f"output={tmp_path / 'run'}"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "config.json: other = 2 is not known here and was not used" in printed
    assert any(line.startswith("config.json: new_thing = {'a'") and len(line) < 150 for line in printed)
    assert not told_by_config(V3)
    wrapped = told_by_config(KIMI_25 | {"audio_thing": 3, "hidden_size": 65, "vocab_size": 128})
    assert [line.split(" = ")[0] for line in wrapped[1:]] == ["config.json: audio_thing", "config.json: hidden_size"]
    with pytest.raises(CheckpointError, match="sliding_window"):
        read(KIMI_25 | {"sliding_window": 8})


def test_every_key_of_transformers_classes_is_known():
    import transformers  # seconds, which collecting tests need not take

    for family in {f.architecture: f for f in FAMILIES.values()}.values():
        configuration = getattr(transformers, family.architecture).config_class
        written = json.loads(configuration(num_experts_per_tok=6, moe_intermediate_size=32).to_json_string())
        assert not [key for key in written if not config_keys.is_known(key)], family.architecture


def test_the_tables_do_not_overlap_and_an_export_has_known_keys_only():
    assert not config_keys.READ & set(config_keys.HARMLESS)
    assert not [key for key in config_keys.HARMLESS if config_keys.refusal(key)]
    assert not set(OUTSIDE) & set(FAMILIES) and set(FAMILIES) == set(
        get_args(ModelSettings.model_fields["model_type"].annotation)
    )
    for model_type in FAMILIES:
        model = read(next(config for config, name in ACCEPTED.values() if name == model_type))
        exported = config_from_settings(model, "fp8", begin=None, end=[1, 2])
        assert not [key for key in exported if not config_keys.is_known(key)] and "capacity_factor" not in exported
        new, old = {"rope_parameters", "mlp_layer_types"}, {"rope_theta", "rope_scaling", "moe_layer_freq"}
        assert set(exported) & (new | old) == (new if model_type == "glm4_moe_lite" else old)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"scoring_func": "softmax"}, "model.scoring_func = softmax"),
        ({"topk_method": "greedy", "n_group": 1, "topk_group": 1}, "model.topk_method = greedy"),
        ({"model_type": "deepseek_v2"}, "model.scoring_func = sigmoid"),
        (
            {"model_type": "deepseek_v2", "scoring_func": "softmax", "norm_topk_prob": False,
             "topk_method": "group_limited_greedy"},
            "model.num_nextn_predict_layers = 1",
        ),
    ],
)  # fmt: skip
def test_a_model_of_no_published_class_is_not_exported_as_one(change, named):
    with pytest.raises(CheckpointError, match=named):
        config_from_settings(read(V3).model_copy(update=change), "bf16", begin=0, end=1)


numbers = st.floats(0.25, 4.0)
scalings = st.builds(
    RopeScaling,
    factor=st.floats(1.0, 64.0),
    original_max_position_embeddings=st.integers(16, 4096),
    beta_fast=st.floats(1.0, 64.0),
    beta_slow=st.floats(0.5, 1.0),
    mscale=st.one_of(st.just(0.0), st.just(1.0), numbers),
    mscale_all_dim=st.one_of(st.just(0.0), st.just(1.0), numbers),
)


@settings(max_examples=examples(200), deadline=None)
@given(st.data())
def test_settings_survive_the_way_through_a_configuration(data):
    model_type = data.draw(st.sampled_from(sorted(FAMILIES)))
    softmax = model_type == "deepseek_v2"
    grouped = data.draw(st.booleans())
    methods = {(True, True): "group_limited_greedy", (True, False): "greedy"}
    layers = data.draw(st.integers(1, 5))
    model = ModelSettings(
        model_type=model_type,
        vocab_size=data.draw(st.integers(1, 500)),
        hidden_size=8 * data.draw(st.integers(1, 9)),
        moe_intermediate_size=8 * data.draw(st.integers(1, 9)),
        intermediate_size=data.draw(st.integers(1, 90)),
        num_hidden_layers=layers,
        first_k_dense_replace=data.draw(st.integers(0, layers)),
        num_attention_heads=data.draw(st.integers(1, 9)),
        q_lora_rank=data.draw(st.one_of(st.none(), st.integers(1, 90))),
        kv_lora_rank=data.draw(st.integers(1, 90)),
        qk_nope_head_dim=data.draw(st.integers(1, 90)),
        qk_rope_head_dim=2 * data.draw(st.integers(1, 9)),
        v_head_dim=data.draw(st.integers(1, 90)),
        n_routed_experts=8,
        n_shared_experts=data.draw(st.integers(0, 3)),
        num_experts_per_tok=data.draw(st.integers(1, 4)),
        n_group=4 if grouped else 1,
        topk_group=2 if grouped else 1,
        scoring_func="softmax" if softmax else "sigmoid",
        topk_method=methods.get((softmax, grouped), "noaux_tc"),
        norm_topk_prob=not softmax and data.draw(st.booleans()),
        routed_scaling_factor=data.draw(numbers),
        num_nextn_predict_layers=0 if softmax else data.draw(st.integers(0, 3)),
        rms_norm_eps=data.draw(st.floats(1e-8, 1e-3)),
        rope_theta=data.draw(st.floats(100.0, 1e7)),
        rope_scaling=data.draw(st.one_of(st.none(), scalings)),
        max_position_embeddings=data.draw(st.integers(1, 10000)),
        initializer_range=data.draw(st.floats(0.0, 1.0)),
    )
    config = json.loads(
        json.dumps(config_from_settings(model, data.draw(st.sampled_from(["fp8", "bf16"])), begin=0, end=1))
    )
    assert settings_from_config(config) == model
