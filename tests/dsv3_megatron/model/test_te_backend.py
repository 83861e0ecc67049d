"""Which of Transformer Engine's modules the te backend is made of, and which FP8 recipe each of them runs under."""

import collections
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from dsv3_megatron.megatron.cpu import virtual_device
from dsv3_megatron.model.backend import make_te_backend
from dsv3_megatron.model.config import transformer_config
from dsv3_megatron.model.costs import count_parameters
from dsv3_megatron.model.stage import build_stage, is_routed_expert
from dsv3_megatron.train.build import build_parts
from dsv3_megatron.train.step import train_step
from launcher.command_line.compose import compose
from parallel.groups import build_groups, start_processes, stop_processes
from parallel.layout import Layout
from parallel.world import World
from testing.ranks import TE, run_ranks
from testing.training.on_te import FP8, WORDS, Training, train
from testing.training.tiny import VALUES, small_recipe, step_batches_of

ROOT = Path(__file__).resolve().parents[3]
TENSOR = tuple(f"precision.fp8.{role}_tile=tensor" for role in ("activation", "weight", "gradient"))
PASSES = 4  # microbatches of a step


def forwards(overrides):
    """Return how often each class of modules ran in a step, by FP8 recipe: {class: {recipe or None: times}}."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager as State

    found = collections.defaultdict(collections.Counter)

    def note(module, given):
        recipe = type(State.get_fp8_recipe()).__name__ if State.is_fp8_enabled() else None
        found[type(module).__name__][recipe] += 1

    recipe = small_recipe(*overrides)
    start_processes(World.from_environment(), torch.device("cpu"))
    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        parts = build_parts(recipe, recipe.layout(1), torch.device("cpu"))
        train_step(parts, step_batches_of(parts), VALUES)
        dispatchers = {
            type(m.token_dispatcher).__name__ for m in parts.whole_model.modules() if hasattr(m, "token_dispatcher")
        } if recipe.parallel.schedule == "1f1b" else set()  # fmt: skip
    finally:
        handle.remove()
        State.reset()
        stop_processes()
    return {name: dict(counts) for name, counts in found.items()} | {"dispatchers": dispatchers}


def norm_epsilons(overrides):
    """Return what the norms of a te model add to the mean square: {name inside its layer: values}."""
    recipe = small_recipe(*overrides)
    start_processes(World.from_environment(), torch.device("cpu"))
    try:
        parts = build_parts(recipe, recipe.layout(1), torch.device("cpu"))
        found = collections.defaultdict(set)
        for name, module in parts.whole_model.named_modules():
            if isinstance(getattr(module, "eps", None), float):
                found[name.rpartition(".")[2]].add(module.eps)
        return dict(found)
    finally:
        stop_processes()


def test_latents_are_normed_with_the_published_epsilon():
    ((found,),) = run_ranks(1, norm_epsilons, [(*WORDS, "model.rms_norm_eps=0.01")], preload=TE)
    assert found["linear_q_up_proj"] == found["linear_kv_up_proj"] == {1e-6}
    assert found["input_layernorm"] == found["pre_mlp_layernorm"] == {0.01}


EXEMPT = "precision.fp8.high_precision_layers=[1,1]"
MODULES = {
    "fp8": FP8,
    "exempt 1f1b": (*FP8, EXEMPT, "parallel.schedule=1f1b"),
    "exempt dualpipev": (*FP8, EXEMPT, "parallel.schedule=dualpipev"),
    "current": (*FP8, *TENSOR),
    "delayed": (*FP8, *TENSOR, "precision.fp8.scaling=delayed", "precision.fp8.swiglu_cache=high"),
}


@pytest.fixture(scope="module")
def ran():
    """Which modules ran under which recipe, by case."""
    return dict(zip(MODULES, (found for (found,) in run_ranks(1, forwards, list(MODULES.values()), preload=TE))))


def test_every_linear_layer_runs_under_block_scaling_and_experts_are_padded(ran):
    found = ran["fp8"]
    assert found["dispatchers"] == {"Fp8AllToAllDispatcher"}
    layers, moe = 4 + 1, 3 + 1  # with the MTP module's
    for name, times in {
        "TELinear": 2 * layers,  # down-projections of queries and keys
        "TELayerNormColumnParallelLinear": 2 * layers + 1,  # up-projections of both, the dense layer's first
        "TEColumnParallelLinear": moe + 1,  # shared experts and eh_proj
        "TERowParallelLinear": layers + moe + 1,  # attention, shared experts, dense layer
        "TEColumnParallelGroupedLinear": moe,
        "TERowParallelGroupedLinear": moe,
        "Fp8Padding": 2 * moe,  # tokens and router weights
    }.items():
        assert found[name] == {"Float8BlockScaling": times * PASSES}, name


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
def test_mtp_is_in_fp8_under_every_schedule(ran, schedule):
    found = ran[f"exempt {schedule}"]
    # One dense and one MoE layer are out; two MoE layers and the MTP module's are in.
    assert found["TELinear"] == {"Float8BlockScaling": 2 * 3 * PASSES, None: 2 * 2 * PASSES}
    assert found["TEColumnParallelGroupedLinear"] == {"Float8BlockScaling": 3 * PASSES, None: PASSES}
    assert found["TEColumnParallelLinear"] == {"Float8BlockScaling": 4 * PASSES, None: PASSES}


@pytest.mark.parametrize(("case", "recipe"), [("current", "Float8CurrentScaling"), ("delayed", "TEDelayedScaling")])
def test_one_scale_a_tensor_is_tes_own_recipe(ran, case, recipe):
    assert set(ran[case]["TELinear"]) == {recipe}


def test_experts_compute_swiglu_again_from_its_fp8_input():
    cases = [Training((*FP8, f"precision.fp8.swiglu_cache={how}")) for how in ("high", "e4m3")]
    high, cached = (found for (found,) in run_ranks(1, train, cases, preload=TE))
    assert cached["losses"][0] == high["losses"][0]  # a forward reads no cache
    assert cached["losses"][1] != high["losses"][1]
    assert cached["losses"][1] == pytest.approx(high["losses"][1], rel=1e-3)


TOLD = """
import sys
from dsv3_megatron.precision.transformer_engine import check_environment, prepare_environment
from launcher.command_line.compose import compose
from parallel.errors import UserError

told, *asked = [compose(["recipe=dsv3_tiny", "precision=fp8", *words.split()]).precision for words in sys.argv[1:]]
prepare_environment(told) if told.fp8.format == "hybrid" else None
for precision in asked:
    try:
        check_environment(precision.fp8)
        print("ready")
    except UserError as error:
        print(error)
"""
EXACT, CURRENT = "precision.fp8.power_of_two_scales=false", " ".join(TENSOR)
LATE = f"{CURRENT} precision.fp8.scaling=delayed"


def said(place, *words):
    """Return what checking the environment says of every policy but the first, of which TE was told if it is hybrid."""
    (place / "told.py").write_text(TOLD)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("NVTE_")}
    done = subprocess.run(
        [sys.executable, "-m", "testing.te", str(place / "told.py"), *words],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()


def test_te_is_told_by_its_environment_before_it_is_imported(tmp_path):
    exact, current, late = said(tmp_path, "", EXACT, CURRENT, LATE)
    assert "power_of_two_scales = false" in exact and "NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1" in exact
    assert "power_of_two_scales = true" in current and "NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES=1" in current
    assert late == "ready"  # scales of amaxes are exact, told or not


@pytest.mark.full
def test_te_is_told_what_a_hybrid_format_needs(tmp_path):
    hybrid = "precision.fp8.format=hybrid"
    assert said(tmp_path, f"{hybrid} {EXACT}", EXACT) == ["ready"]
    assert said(tmp_path, f"{hybrid} {CURRENT}", CURRENT) == ["ready"]


def built(name):
    """Build a recipe's model at its true size without memory; return what it is made of."""
    recipe = compose([f"recipe={name}"])
    start_processes(World.from_environment(), torch.device("cpu"))
    try:
        groups, layers = build_groups(Layout()), recipe.model.num_hidden_layers
        model_parallel_cuda_manual_seed(1, te_rng_tracker=False)
        with virtual_device(torch.device("meta")), torch.no_grad():
            config = transformer_config(recipe.model, recipe.parallel, Layout(), dtype=torch.bfloat16)
            module = build_stage(config, recipe.model, make_te_backend(), stage=0, layers_of_stages=(layers,),
                                 sequence_length=4096, groups=groups)  # fmt: skip
        sizes = {"main": 0, "mtp": 0}
        for key, parameter in module.named_parameters():
            sizes["mtp" if key.startswith("mtp.") else "main"] += parameter.numel()
        attention = next(m for m in module.modules() if type(m).__name__ == "TEDotProductAttention")
        return {
            **sizes,
            "modules": collections.Counter(type(m).__name__ for m in module.modules()),
            "expert_allreduce": {p.allreduce for key, p in module.named_parameters() if is_routed_expert(key)},
            "attention": [attention.hidden_size_per_attention_head_k, attention.hidden_size_per_attention_head_v],
        }
    finally:
        stop_processes()


def test_the_specs_build_on_transformer_engine_modules():
    recipes = ["dsv3_tiny", "dsv3_one_gpu"]
    for name, (found,) in zip(recipes, run_ranks(1, built, recipes, preload=TE)):
        model = compose([f"recipe={name}"]).model
        counted = count_parameters(model)
        assert (found["main"], found["mtp"]) == (counted.main, counted.mtp)
        moe = model.num_moe_layers + model.num_nextn_predict_layers
        modules = found["modules"]
        assert modules["TEColumnParallelGroupedLinear"] == modules["TERowParallelGroupedLinear"] == moe
        assert found["expert_allreduce"] == {False}
        assert found["attention"] == [model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim]


def test_float32_on_te_needs_no_fp8():
    ((found,),) = run_ranks(1, forwards, [WORDS], preload=TE)
    assert {recipe for name, counts in found.items() if name != "dispatchers" for recipe in counts} == {None}
