"""The time model: the table it is fitted to, what must follow from it, and published steps it was not built from."""

import json

import pytest

from dsv3_megatron.planning.memory.formulae import estimate_stages
from dsv3_megatron.planning.plan import make_plan
from dsv3_megatron.planning.time.calibrate import times_from_file
from dsv3_megatron.planning.time.kernels import Kernels
from dsv3_megatron.planning.time.roofline import DEEPGEMM, Device
from dsv3_megatron.planning.time.steptime import StepModel
from dsv3_megatron.settings import ClusterSettings
from launcher.command_line.compose import compose
from parallel.errors import RecipeError

H800 = ClusterSettings(name="h", sms=132, memory_terabytes_per_second=3.35, peak_tflops={"fp8": 1979, "bf16": 989.5})


@pytest.mark.parametrize("row", DEEPGEMM)
def test_products_take_what_deepgemm_publishes(row):
    m, n, k, rate = row
    groups = 1 if m == 4096 else 4
    seconds = Device(H800).product(m / groups, n, k, "fp8", groups=groups)
    assert 2 * m * n * k / seconds / 1e12 == pytest.approx(rate, rel=0.03)


def test_kernels_are_slower_beside_communication():
    alone, beside = Device(H800), Device(H800, 20)
    assert beside.product(4096, 7168, 7168, "fp8") > 1.1 * alone.product(4096, 7168, 7168, "fp8")


def test_deepseek_step_is_predicted_within_fifteen_percent():
    plan = make_plan(compose(["recipe=dsv3_671b"]), 2048, measure=estimate_stages)
    assert plan.step.seconds == pytest.approx(19.926, rel=0.15)
    assert plan.step.bubble_seconds == pytest.approx(2.06, rel=0.15)
    assert plan.tokens == 62_914_560
    # The published conventions: 385 and 432 TFLOP/s at 1,541.7 tokens/s a GPU.
    per_token = plan.tflops_per_device(causal=True) / (plan.tokens_per_second / 2048)
    assert per_token * 1541.7 == pytest.approx(385, rel=0.002)
    assert plan.tflops_per_device(causal=False) / plan.tflops_per_device(causal=True) == pytest.approx(
        432 / 385, rel=2e-3
    )


@pytest.mark.parametrize("name", ["dsv3_671b", "dsv3_671b_32k", "dsv3_671b_128k"])
def test_a_step_that_is_given_up_has_taken_twice_as_long_as_planned(name):
    """``run.abort_seconds`` is of one action; in the first step any of them may take as long as a whole step."""
    recipe = compose([f"recipe={name}"])
    assert 2 * make_plan(recipe, 2048, measure=estimate_stages).step.seconds < recipe.run.abort_seconds <= 300


def test_the_end_of_a_step_touches_every_gradient_and_its_shard_of_the_states():
    recipe = compose(["recipe=dsv3_one_gpu"])
    plan = make_plan(recipe, 1, measure=estimate_stages)
    held = sum(stage.parameters for stage in plan.stages)
    in_fp8 = sum(stage.fp8_parameters for stage in plan.stages)
    nbytes = held * (34 + 8 + 4) + in_fp8 * 4
    assert plan.step.optimizer_seconds == pytest.approx(Device(recipe.cluster).memory(nbytes))


def test_recomputing_whole_layers_exchanges_their_tokens_once_more():
    def backward(*recompute):
        recipe = compose(["recipe=dsv3_671b", "parallel.schedule=1f1b", f"parallel.recompute=[{','.join(recompute)}]"])
        return StepModel(recipe, recipe.layout(2048), (4,) * 15 + (1,)).stage(5)

    plain, whole = backward(), backward("full")
    assert whole.input_grad.exchanges == pytest.approx(2 * plain.input_grad.exchanges)
    assert whole.forward == plain.forward


def test_exchanges_take_longer_on_fewer_sms_than_they_were_measured_with():
    recipe = compose(["recipe=dsv3_671b"])  # 20 SMs, of DeepEP's 24
    stage = StepModel(recipe, recipe.layout(2048), (4,) * 15 + (1,)).stage(5)
    assert stage.forward.exchanges_beside == pytest.approx(1.2 * stage.forward.exchanges)


@pytest.mark.parametrize(("expert", "twice"), [(128, 1 / 31), (64, 3 / 31), (32, 7 / 31)])
def test_sorting_reads_each_token_of_a_rank_once_and_writes_a_copy_for_each_of_its_experts(expert, twice):
    """Two of a token's 8 experts come from each of its 4 groups of 32: the other one is here with chance ``twice``."""
    recipe = compose(["recipe=dsv3_671b", f"parallel.expert={expert}", "precision.fp8.dispatch=high"])
    device = Device(recipe.cluster)
    seconds = Kernels(recipe, recipe.layout(2048), device).layer(moe=True).passes["F"]["sorting"]
    rows = 4096 * 8
    moved = rows + rows * (1 - twice / 2)
    assert seconds == pytest.approx(2 * device.memory(moved * 7168 * 2))


def test_measured_times_replace_the_roofline(tmp_path):
    recipe = compose(["recipe=dsv3_671b"])
    path = tmp_path / "times.json"
    path.write_text(
        json.dumps({"forward": 0.0576, "input_grad": 0.084, "weight_grad": 0.042, "overlapped": 0.139, "send": 0.0013})
    )
    plan = make_plan(recipe, 2048, measure=estimate_stages, times=times_from_file(path, recipe))
    # By hand: (P/2 - 1)(F&B + B - 3W) is waiting of equal stages; sends add to it.
    assert plan.step.bubble_seconds == pytest.approx(7 * (0.139 + 0.126 - 3 * 0.042), rel=0.25)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "calibrate"),
        ('{"forward": [1.0], "input_grad": 1.0, "weight_grad": 1.0}', "forward has 1 numbers"),
        ("{}", "forward"),
    ],
)
def test_bad_calibration_is_one_line(tmp_path, text, says):
    path = tmp_path / "times.json"
    path.write_text(text)
    with pytest.raises(RecipeError, match=says):
        times_from_file(path, compose(["recipe=dsv3_671b"]))


def test_qk_clip_costs_one_more_product_of_queries_and_keys_in_the_forward():
    def passes(*words):
        recipe = compose(["recipe=dsv3_671b", "precision=bf16", *words])
        return recipe, Kernels(recipe, recipe.layout(2048), Device(recipe.cluster)).layer(moe=True).passes

    (_, free), (recipe, clipped) = passes(), passes("optim.qk_clip=100")
    logits = clipped["F"] - free["F"]
    assert list(logits) == ["largest logits"] and clipped["I"] == free["I"] and clipped["W"] == free["W"]
    pairs = 4096**2 / 2 * 128
    written_and_read = Device(recipe.cluster).memory(8 * pairs)
    assert logits["largest logits"] >= written_and_read
    assert logits["largest logits"] >= 2 * pairs * 192 / (1e12 * recipe.cluster.peak_tflops["bf16"])
    assert logits["largest logits"] < 2 * written_and_read
    _, again = passes("optim.qk_clip=100", "parallel.recompute=[attention]")
    assert again["I"]["largest logits"] == logits["largest logits"]
    assert passes("optim.qk_clip=100", "parallel.recompute=[full]")[1]["I"]["largest logits"] > 0


def test_qk_clip_exchanges_a_number_of_each_head():
    recipe = compose(["recipe=dsv3_671b", "optim.qk_clip=100"])
    moved = StepModel(recipe, recipe.layout(2048), (4,) * 15 + (1,)).traffic.largest_logits()
    heads = 62 * 128 * 4 * 2 * 2047 / 2048
    assert moved.intra_bytes + moved.inter_bytes == pytest.approx(heads, rel=0.01)
