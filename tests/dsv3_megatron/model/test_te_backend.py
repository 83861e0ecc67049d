"""The te backend as far as a machine without a GPU sees it: built and trained on a stand-in that records its calls."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_megatron.model.costs import count_parameters
from launcher.compose import compose

ROOT = Path(__file__).resolve().parents[3]


def run_with_stand_in(script, *arguments):
    """Return what a script prints as JSON in a process that has the stand-in for Transformer Engine."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'tests' / 'te_stub'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    environment.pop("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", None)
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


SMALL = ("recipe=dsv3_tiny", "data.sequence_length=64", "optim.global_batch=8")
FP8 = (*SMALL, "precision=fp8", "precision.parameters=fp32", "precision.moments=fp32")


def train(*overrides):
    return run_with_stand_in("te_on_cpu.py", *overrides)


def in_fp8(found):
    """Return how often each class of modules ran in FP8 and how often not."""
    counts = {}
    for name, recipe, count in found["forwards"]:
        counts.setdefault(name, [0, 0])[0 if recipe else 1] += count
    return counts


@pytest.fixture(scope="module")
def plain():
    return train(*SMALL)


def test_the_te_backend_trains_as_the_torch_backend(plain):
    torch_backend = train(*SMALL, "backend=torch")
    assert plain["losses"] == pytest.approx(torch_backend["losses"], rel=1e-6)
    assert not torch_backend["forwards"] and all(recipe is None for _, recipe, _ in plain["forwards"])


def test_weight_gradients_are_left_to_their_action_under_overlapping_schedules(plain):
    found = train(*SMALL, "parallel.schedule=dualpipev")
    assert found["losses"] == pytest.approx(plain["losses"], rel=1e-6)


def test_every_linear_layer_runs_under_block_scaling_and_experts_are_padded():
    found = train(*FP8)
    recipes = {recipe for _, recipe, _ in found["forwards"]}
    assert recipes == {"Float8BlockScaling:e4m3", None}  # None: the final norms, outside of every layer
    assert found["dispatchers"] == ["Fp8AllToAllDispatcher"]
    counts = in_fp8(found)
    passes = 4 * 2  # microbatches x steps
    layers, moe = 4 + 1, 3 + 1  # with the MTP module's
    assert counts["TELinear"] == [2 * layers * passes, 0]  # down-projections of queries and keys
    # Up-projections of queries and keys, and the dense layer's first.
    assert counts["TELayerNormColumnParallelLinear"] == [(2 * layers + 1) * passes, 0]
    assert counts["TEColumnParallelLinear"] == [(moe + 1) * passes, 0]  # shared experts and eh_proj
    assert counts["TERowParallelLinear"] == [(layers + moe + 1) * passes, 0]  # attention, shared experts, dense layer
    for name in ("TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"):
        assert counts[name] == [moe * passes, 0]
    assert counts["Fp8Padding"] == [2 * moe * passes, 0]  # tokens and router weights


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
def test_mtp_is_in_fp8_under_every_schedule(schedule):
    exempt = ("precision.fp8.high_precision_layers=[1,1]", f"parallel.schedule={schedule}")
    counts = in_fp8(train(*FP8, *exempt))
    passes = 4 * 2
    # One dense and one MoE layer are out; two MoE layers and the MTP module's are in.
    assert counts["TELinear"] == [2 * 3 * passes, 2 * 2 * passes]
    assert counts["TEColumnParallelGroupedLinear"] == [3 * passes, passes]
    assert counts["TEColumnParallelLinear"] == [(3 + 1) * passes, passes]


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
def test_experts_compute_swiglu_again_from_its_fp8_input(plain, schedule):
    # Products are in high precision here, dispatch too: what differs from plain training is SwiGLU's cache alone.
    found = train(*FP8, "precision.fp8.dispatch=high", f"parallel.schedule={schedule}")
    assert found["losses"][0] == pytest.approx(plain["losses"][0], rel=1e-7)
    assert found["losses"][1] != plain["losses"][1]
    assert found["losses"][1] == pytest.approx(plain["losses"][1], rel=1e-3)


def test_scales_are_told_to_te_before_it_is_imported():
    exact = (*FP8, "precision.fp8.power_of_two_scales=false")
    assert "losses" in train(*exact)
    refused = train(*exact, "--untold")["refused"]
    assert "power_of_two_scales = false" in refused and "NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1" in refused


def test_weights_can_be_held_in_fp8():
    found = train(*FP8, "precision.fp8.hold_weights=true")
    assert found["inits"] == [["Float8BlockScaling:e4m3", False]]


@pytest.mark.parametrize(
    ("tiles", "scaling", "recipe"),
    [
        (("tensor", "tensor", "tensor"), "current", "Float8CurrentScaling:e4m3"),
        (("tensor", "tensor", "tensor"), "delayed", "TEDelayedScaling:e4m3"),
    ],
)
def test_one_scale_a_tensor_is_tes_own_recipe(tiles, scaling, recipe):
    words = [f"precision.fp8.{r}_tile={t}" for r, t in zip(("activation", "weight", "gradient"), tiles)]
    found = train(*FP8, *words, f"precision.fp8.scaling={scaling}")
    assert {r for _, r, _ in found["forwards"]} <= {recipe, None}
    assert recipe in {r for _, r, _ in found["forwards"]}


@pytest.mark.parametrize(
    ("override", "mend"),
    [
        ("gradient_tile=128x128", "gradient_tile=1x128"),
        ("accumulation=14bit", "backend=torch"),
        ("wgrad_operands=retiled", "wgrad_operands=requantised"),
    ],
)
def test_what_only_the_emulation_can_do_is_refused(override, mend):
    refused = train(*FP8, f"precision.fp8.{override}")["refused"]
    assert override.split("=")[0] in refused and mend in refused and "\n" not in refused


@pytest.mark.parametrize("recipe", ["dsv3_tiny", "dsv3_one_gpu"])
def test_the_specs_build_on_transformer_engine_modules(recipe):
    found = run_with_stand_in("te_on_meta.py", recipe)
    model = compose([f"recipe={recipe}"]).model
    counted = count_parameters(model)
    assert (found["main"], found["mtp"]) == (counted.main, counted.mtp)
    moe = model.num_moe_layers + model.num_nextn_predict_layers
    assert found["calls"]["TEColumnParallelGroupedLinear"] == found["calls"]["TERowParallelGroupedLinear"] == moe
    assert found["expert_allreduce"] == [False]
    query_key = model.qk_nope_head_dim + model.qk_rope_head_dim
    assert found["attention"] == [query_key, model.v_head_dim]
