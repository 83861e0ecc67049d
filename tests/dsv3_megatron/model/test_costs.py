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


FREEZES = (
    "[embedding,layers.0-1]",
    "[head,experts,mtp]",
    "[norms]",
    "[attention,dense,router,shared_experts,layers.3]",
)


@pytest.mark.parametrize("more", [(), ("model.num_nextn_predict_layers=2", "model.first_k_dense_replace=4")])
@pytest.mark.parametrize("freeze", FREEZES)
def test_what_is_frozen_is_counted_as_the_modules_have_it(freeze, more, one_process):
    absent = ("router,shared_experts,", "experts,") if more else ()  # of a model without MoE layers; longest first
    for words in absent:
        freeze = freeze.replace(words, "")
    model = compose(["recipe=dsv3_tiny", f"model.freeze={freeze}", *more]).model
    module, counted = modules_on_meta(model, one_process), count_parameters(model)
    frozen = sum(p.numel() for p in module.parameters() if not p.requires_grad)
    assert counted.frozen == frozen > 0
    assert counted.trained == sum(p.numel() for p in module.parameters()) - frozen


def test_a_frozen_matrix_costs_four_operations_a_token():
    def flops(*words):
        return training_flops_per_token(compose(["recipe=dsv3_tiny", *words]).model, 256)

    model = compose(["recipe=dsv3_tiny"]).model
    d, layers = model.hidden_size, model.num_moe_layers + model.num_nextn_predict_layers
    active = layers * model.num_experts_per_tok * 3 * d * model.moe_intermediate_size
    assert flops() - flops("model.freeze=[experts]") == 2 * active
    assert flops() - flops("model.freeze=[head]") == 2 * 2 * model.vocab_size * d  # the MTP module's prediction too
    assert flops() == flops("model.freeze=[embedding]") == flops("model.freeze=[norms]")
    parts = ("attention", "dense", "experts", "shared_experts", "router")
    layerwise = f"model.freeze=[layers.0-{model.num_hidden_layers - 1},mtp]"
    apart = sum(flops() - flops(f"model.freeze=[{part}]") for part in parts)
    joint = 2 * 2 * d * d
    assert flops() - flops(layerwise) == apart + joint
