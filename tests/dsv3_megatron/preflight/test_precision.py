"""What FP8 needs of a machine and of shapes: one line each, before anything starts."""

from pathlib import Path

import pytest
import torch

from dsv3_megatron.precision.on_te import deviations
from dsv3_megatron.precision.transformer_engine import check_hardware, check_policy
from dsv3_megatron.preflight.fp8_shapes import check_shapes
from dsv3_megatron.preflight.precision import check_precision
from launcher.command_line.compose import compose
from parallel.errors import LayoutError, PackageError, RecipeError, UserError

CPU = torch.device("cpu")
TENSOR = [f"precision.fp8.{role}_tile=tensor" for role in ("activation", "weight", "gradient")]


@pytest.mark.parametrize(
    ("capability", "cuda", "te", "named"),
    [
        ((8, 0), "13.0", "2.9.0", "compute capability 9.0"),
        ((9, 0), "12.8", "2.9.0", "CUDA 12.9"),
        ((9, 0), None, "2.9.0", "CUDA 12.9"),
        ((9, 0), "13.0", "2.8.1", "transformer-engine 2.9"),
    ],
)
def test_a_machine_that_cannot_is_told_so(capability, cuda, te, named):
    with pytest.raises(PackageError, match=named) as error:
        check_hardware(capability, cuda, te)
    assert "set " in str(error.value) or "install" in str(error.value)


def test_a_hopper_passes_and_a_blackwell_is_told_of_mxfp8():
    assert check_hardware((9, 0), "12.9", "2.20.2") is None
    assert "MXFP8" in check_hardware((10, 0), "13.0", "2.20.2")


def test_what_te_does_otherwise_is_told():
    lines = deviations(compose(["recipe=dsv3_671b"]).precision.fp8)
    assert len(lines) == 2 and "SwiGLU" in lines[0] and "one copy" in lines[1]


RECIPES = ("dsv3_671b", "kimi_k2", "moonlight_16b", "glm_4_7_flash", "dsv3_1b", "dsv3_one_gpu", "dsv3_article")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_shapes_of_recipes_for_gpus_divide(recipe):
    check_shapes(compose([f"recipe={recipe}"]))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.moe_intermediate_size=2040", "moe_intermediate_size = 2040"),
        ("model.kv_lora_rank=500", "kv_lora_rank = 500"),
        ("data.sequence_length=4100", "tokens of a microbatch"),
    ],
)
def test_a_width_that_does_not_divide_is_named_with_the_nearest(override, named):
    with pytest.raises(LayoutError, match="multiple of 16") as error:
        check_shapes(compose(["recipe=dsv3_one_gpu", override]))
    assert named in str(error.value) and "nearest that is" in str(error.value)


def test_how_fp8_is_carried_out_is_told_at_the_start():
    (line,) = check_precision(compose(["recipe=dsv3_tiny", "precision=fp8"]), "torch", CPU)
    assert "emulated (there is no GPU)" in line
    assert check_precision(compose(["recipe=dsv3_tiny"]), "torch", CPU) == []


def test_holding_weights_in_fp8_is_refused_by_the_emulation():
    with pytest.raises(RecipeError, match="hold_weights"):
        check_precision(compose(["recipe=dsv3_tiny", "precision=fp8", "precision.fp8.hold_weights=true"]), "torch", CPU)


DELAYED = ["recipe=dsv3_tiny", "precision=fp8", *TENSOR, "precision.fp8.scaling=delayed"]


@pytest.mark.parametrize(
    ("overrides", "named", "help"),
    [
        (("parallel.schedule=dualpipev",), "parallel.schedule=dualpipev would train without FP8", "schedule=1f1b"),
        (("parallel.pipeline=2",), "parallel.pipeline = 2", "parallel.pipeline=1"),
        (("parallel.recompute=[norm,mla_up,moe_act]",), r"parallel.recompute = \[moe_act, norm\]", "scaling=current"),
        ((), "precision.fp8.swiglu_cache = e4m3", "swiglu_cache=high"),
        (("precision.fp8.swiglu_cache=high", "precision.fp8.hold_weights=true"), "hold_weights = true", "hold_weights"),
    ],
)
def test_delayed_scaling_on_te_is_refused_where_it_would_fail_or_not_be_fp8(overrides, named, help):
    with pytest.raises(UserError, match=named) as error:
        check_precision(compose([*DELAYED, *overrides]), "te", CPU)
    assert help in str(error.value) and "\n" not in str(error.value)


def test_what_te_does_otherwise_with_tensor_tiles_is_told():
    lines = deviations(compose([*DELAYED, "precision.fp8.swiglu_cache=high"]).precision.fp8)
    assert any("fast accumulation" in line for line in lines) and any("powers of two" in line for line in lines)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("precision.fp8.scaling=delayed", "all three tiles to tensor"),
        ("precision.fp8.format=e3m4", "precision.fp8.format = e3m4"),
        ("precision.fp8.activation_tile=1x64", "precision.fp8.activation_tile = 1x64"),
    ],
)
def test_a_policy_that_contradicts_itself_is_refused(override, named):
    with pytest.raises(RecipeError, match=named):
        compose(["recipe=dsv3_tiny", "precision=fp8", override])


def test_retiling_needs_tiles_to_cut():
    with pytest.raises(RecipeError, match="wgrad_operands"):
        compose(["recipe=dsv3_tiny", "precision=fp8", *TENSOR, "precision.fp8.wgrad_operands=retiled"])


@pytest.mark.parametrize("recipe", sorted(path.stem for path in Path("recipes/recipe").glob("*.yaml")))
@pytest.mark.parametrize("name", ["fp32", "bf16", "fp8"])
def test_a_precision_asked_for_is_the_one_that_is_taken(recipe, name):
    found = compose([f"recipe={recipe}", f"precision={name}"]).precision
    assert found.name == name and (found.fp8 is not None) == (name == "fp8")


def test_a_key_of_fp8_does_not_switch_it_on_under_another_name():
    with pytest.raises(RecipeError, match="precision.name = bf16, but precision.fp8 is set"):
        compose(["recipe=dsv3_tiny", "precision=bf16", "precision.fp8={hold_weights: true}"])


@pytest.mark.parametrize(
    ("override", "help"),
    [
        ("gradient_tile=128x128", "gradient_tile=1x128"),
        ("accumulation=14bit", "backend=torch"),
        ("wgrad_operands=retiled", "wgrad_operands=requantised"),
    ],
)
def test_what_only_the_emulation_can_do_is_refused_on_te(override, help):
    with pytest.raises(RecipeError, match=override.split("=")[0]) as error:
        check_policy(compose(["recipe=dsv3_tiny", "precision=fp8", f"precision.fp8.{override}"]).precision.fp8)
    assert help in str(error.value) and "\n" not in str(error.value)
