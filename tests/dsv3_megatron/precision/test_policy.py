"""The policy: which modules of the model as built multiply in FP8, and how it is shown."""

import json

import pytest

from dsv3_megatron.planning.whole_model import meta_model
from dsv3_megatron.precision.policy import module_class, policy
from dsv3_megatron.precision.products import Fp8Products
from launcher.command_line.compose import compose
from launcher.plan import main
from parallel.errors import RecipeError

SMALL = ("recipe=dsv3_tiny", "precision=fp8")


def in_fp8(*overrides):
    with meta_model(compose([*SMALL, *overrides])) as model:
        return {n for n, m in model.named_modules() if isinstance(getattr(m, "products", None), Fp8Products)}


def test_all_linear_layers_and_nothing_else_are_in_fp8():
    names = in_fp8()
    attention = ("linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj", "linear_proj")
    expected = {f"decoder.layers.{i}.self_attention.{name}" for i in range(4) for name in attention}
    expected |= {f"decoder.layers.0.mlp.linear_fc{k}" for k in (1, 2)}
    for block in [f"decoder.layers.{i}.mlp" for i in (1, 2, 3)] + ["mtp.layers.0.transformer_layer.mlp"]:
        expected |= {f"{block}.{part}.linear_fc{k}" for part in ("experts", "shared_experts") for k in (1, 2)}
    expected |= {f"mtp.layers.0.transformer_layer.self_attention.{name}" for name in attention}
    assert names == expected | {"mtp.layers.0.eh_proj"}


def test_first_and_last_layers_can_stay_out():
    names = in_fp8("precision.fp8.high_precision_layers=[1,2]")
    assert {name.split(".")[2] for name in names if name.startswith("decoder")} == {"1"}
    assert any(name.startswith("mtp") for name in names)


def test_without_fp8_nothing_is():
    with meta_model(compose(["recipe=dsv3_tiny"])) as model:
        assert not any(isinstance(getattr(m, "products", None), Fp8Products) for m in model.modules())


def test_the_papers_table_is_the_policy_of_the_papers_recipe():
    rows = {row.tensor: row for row in policy(compose(["recipe=dsv3_671b"]).precision)}
    assert (rows["linear inputs"].format, rows["linear inputs"].tile) == ("e4m3", "1x128")
    assert (rows["linear weights"].format, rows["linear weights"].tile) == ("e4m3", "128x128")
    assert (rows["gradients of linear outputs"].format) == "e4m3"
    for name in ("embedding", "output head", "pipeline sends", "AdamW moments"):
        assert rows[name].format == "bf16"
    for name in ("router gate", "master weights", "gradient accumulation and reduction"):
        assert rows[name].format == "fp32"


def test_the_table_is_read_off_the_modules(capsys):
    assert main([*SMALL, "show=precision", "format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    products = {module["name"]: module["products"] for module in found["modules"]}
    assert products["decoder.layers.1.mlp.experts.linear_fc1.weight"].startswith("fp8 x fp8")
    assert products["output_layer.weight"] == "bfloat16"
    assert products["decoder.layers.1.mlp.router.weight"] == "fp32"
    assert main([*SMALL, "show=precision"]) == 0
    assert "decoder.layers.*.self_attention.linear_proj.weight" in capsys.readouterr().out


def test_an_unknown_view_or_module_is_told():
    with pytest.raises(RecipeError, match="show = nothing: input should be .precision., .optimizer. or .regime."):
        main([*SMALL, "show=nothing"])
    with pytest.raises(ValueError, match="no class"):
        module_class("strange.weight")
