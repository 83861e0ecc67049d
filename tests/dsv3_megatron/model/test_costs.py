"""Exact counts: against the published totals, and against the modules themselves on the meta device."""

import pytest
import torch

from dsv3_megatron.megatron.cpu import virtual_device
from dsv3_megatron.model.backend import TorchBackend
from dsv3_megatron.model.config import transformer_config
from dsv3_megatron.model.costs import attention_parameters, count_parameters, training_flops_per_token
from dsv3_megatron.model.settings import ModelSettings
from dsv3_megatron.model.stage import build_stage
from dsv3_megatron.pipeline.split import balanced_stages
from launcher.command_line.compose import compose
from parallel.layout import Layout
from parallel.schedules import placement
from parallel.settings import ParallelSettings

PUBLISHED = {  # of the 671B model, from its checkpoint's tensor listing
    "embedding": 926_679_040,
    "head": 926_679_040,
    "attention": 187_107_328,
    "dense_layer": 583_483_392,
    "moe_layer": 11_507_286_016,
    "routed_expert": 44_040_192,
    "gate": 1_835_008,
    "main": 671_026_404_352,
    "mtp": 11_610_067_968,
    "activated_per_token": 36_625_603_584,
}


@pytest.mark.parametrize("part", PUBLISHED)
def test_parameters_of_the_671b_equal_the_published_checkpoint(part):
    assert getattr(count_parameters(compose(["recipe=dsv3_671b"]).model), part) == PUBLISHED[part]


def test_parameters_of_the_16b_equal_the_published_checkpoint():
    assert count_parameters(compose(["recipe=moonlight_16b"]).model).main == 15_960_108_544


def modules_on_meta(model: ModelSettings, groups) -> torch.nn.Module:
    """Return the whole model as modules without memory."""
    layout = Layout()
    with virtual_device(torch.device("meta")):
        config = transformer_config(model, ParallelSettings(), layout)
        stages = (model.num_hidden_layers,)
        return build_stage(
            config, model, TorchBackend(), stage=0, layers_of_stages=stages, sequence_length=4096, groups=groups
        )


RECIPES = ("dsv3_671b", "moonlight_16b", "glm_4_7_flash", "dsv3_150m", "dsv3_tiny", "dsv3_one_gpu")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_modules_hold_as_many_parameters_as_the_formulae_say(recipe, one_process):
    model = compose([f"recipe={recipe}"]).model
    module = modules_on_meta(model, one_process)
    counted = count_parameters(model)
    mtp = sum(p.numel() for name, p in module.named_parameters() if name.startswith("mtp."))
    main = sum(p.numel() for name, p in module.named_parameters() if not name.startswith("mtp."))
    assert all(p.is_meta for p in module.parameters())
    assert (main, mtp) == (counted.main, counted.mtp)


def test_router_biases_of_the_671b_are_buffers_one_per_expert(one_process):
    module = modules_on_meta(compose(["recipe=dsv3_671b"]).model, one_process)
    biases = [b for name, b in module.named_buffers() if name.endswith("expert_bias")]
    assert sum(b.numel() for b in biases) == 58 * 256 + 256
    assert all(b.dtype is torch.float32 for b in biases)


def test_flops_per_token_are_the_published_250_gigaflops_without_mtp():
    model = compose(["recipe=dsv3_671b", "model.num_nextn_predict_layers=0"]).model
    assert training_flops_per_token(model, 4096) / 1e9 == pytest.approx(250.4, abs=0.1)


def test_attention_without_query_compression_has_one_query_matrix():
    full = ModelSettings(
        q_lora_rank=None,
        hidden_size=64,
        num_attention_heads=2,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        kv_lora_rank=16,
    )
    assert attention_parameters(full) == 64 * 24 + 64 * 20 + 16 + 16 * 32 + 16 * 64


@pytest.mark.parametrize("stages", [1, 2, 4, 8, 16])
def test_balanced_stages_hold_every_layer_once_and_none_is_empty(stages):
    model = compose(["recipe=dsv3_671b"]).model
    layers = balanced_stages(model, placement("1f1b", stages, 1))
    assert len(layers) == stages and sum(layers) == 61 and min(layers) >= 1


def test_the_last_stage_gets_fewer_layers_for_its_head_and_mtp():
    layers = balanced_stages(compose(["recipe=dsv3_671b"]).model, placement("1f1b", 16, 1))
    assert layers == (*[4] * 15, 1)
