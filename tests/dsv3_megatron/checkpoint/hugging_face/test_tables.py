"""The tables of published weights and configurations: shapes, sizes, shards, and what a configuration becomes."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.checkpoint.hugging_face.config import config_from_settings, settings_from_config
from dsv3_megatron.checkpoint.hugging_face.export import file_bytes, plan_shards
from dsv3_megatron.checkpoint.hugging_face.names import our_shapes, published_tensors
from dsv3_megatron.model.settings import ModelSettings, RopeScaling
from launcher import import_hf
from launcher.command_line.compose import compose, load_resolved
from parallel.errors import CheckpointError, RecipeError
from testing.lanes import examples

PUBLISHED = {  # config.json of deepseek-ai/DeepSeek-V3
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
    "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                            "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128,
    "vocab_size": 129280,
}  # fmt: skip


def test_the_fp8_files_of_the_671b_have_the_published_size():
    sizes = [file_bytes(tensor, "fp8") for tensor in published_tensors(ModelSettings())]
    assert sum(sizes) == 688_574_839_360


def test_shards_keep_to_their_size_and_hold_everything_once():
    model = ModelSettings()
    shards = plan_shards(model, Path("a"), Path("b"), dtype="fp8", shard_bytes=5 * 2**30)
    assert all(sum(file_bytes(t, "fp8") for t in shard.tensors) <= 5 * 2**30 for shard in shards)
    names = [tensor.name for shard in shards for tensor in shard.tensors]
    assert names == [tensor.name for tensor in published_tensors(model)] and len(set(names)) == len(names)
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"


models = st.builds(
    ModelSettings,
    vocab_size=st.just(16),
    hidden_size=st.sampled_from([8, 16]),
    intermediate_size=st.sampled_from([8, 24]),
    moe_intermediate_size=st.just(8),
    num_hidden_layers=st.integers(1, 3),
    first_k_dense_replace=st.integers(0, 1),
    num_attention_heads=st.sampled_from([1, 2]),
    q_lora_rank=st.sampled_from([None, 8]),
    kv_lora_rank=st.just(4),
    qk_nope_head_dim=st.sampled_from([4, 6]),
    qk_rope_head_dim=st.just(4),
    v_head_dim=st.sampled_from([4, 10]),
    n_routed_experts=st.sampled_from([2, 4]),
    n_shared_experts=st.integers(0, 2),
    n_group=st.just(1),
    topk_group=st.just(1),
    num_experts_per_tok=st.just(2),
    num_nextn_predict_layers=st.integers(0, 2),
)


@given(models)
@settings(max_examples=examples(30), deadline=None)
def test_the_boxes_of_the_table_fill_our_tensors_once(model):
    filled = {key: torch.zeros(shape, dtype=torch.int32) for key, shape in our_shapes(model).items()}
    for tensor in published_tensors(model):
        assert math.prod(tensor.shape) == math.prod(tensor.extent)
        if tensor.copy_of is None:
            filled[tensor.key][tuple(slice(s, s + e) for s, e in zip(tensor.start, tensor.extent))] += 1
    assert all((count == 1).all() for count in filled.values())


@given(models, st.booleans())
@settings(max_examples=examples(30), deadline=None)
def test_a_configuration_survives_the_round_trip(model, long):
    if long:
        model = model.model_copy(update={"rope_scaling": RopeScaling()})
    config = json.loads(json.dumps(config_from_settings(model, "fp8", begin=0, end=1)))
    assert settings_from_config(config) == model


def test_the_published_configuration_is_the_shipped_recipe():
    model = settings_from_config(PUBLISHED)
    shipped = compose(["recipe=dsv3_671b", "model=dsv3_671b_yarn"]).model
    differing = {k for k in ModelSettings.model_fields if getattr(model, k) != getattr(shipped, k)}
    assert differing <= {"initializer_range", "max_position_embeddings"}  # training's own, and the length of serving


def test_a_configuration_alone_gives_a_recipe(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    output = tmp_path / "run"
    assert import_hf.main([f"input={tmp_path / 'config.json'}", f"output={output}"]) == 0
    recipe = load_resolved(output / "recipe.yaml")
    assert recipe.model == settings_from_config(PUBLISHED) and recipe.parallel.pipeline == 16
    assert compose([f"recipe={output / 'recipe.yaml'}", "parallel.pipeline=8", "precision=fp32"]).parallel.pipeline == 8


@pytest.mark.parametrize(
    ("key", "value"),
    [("model_type", "llama"), ("hidden_act", "gelu"), ("num_key_value_heads", 2), ("n_group", 7), ("vocab_size", -1)],
)
def test_another_kind_of_model_is_refused_by_its_key(key, value):
    with pytest.raises((CheckpointError, RecipeError), match=key) as refused:
        settings_from_config({**PUBLISHED, key: value})
    assert "\n" not in str(refused.value)
