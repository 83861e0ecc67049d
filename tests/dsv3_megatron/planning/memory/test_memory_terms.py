"""Every term of a rank's memory against a case worked out by hand, and what more of an axis must never do."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.pipeline.schedule import schedule_of
from dsv3_megatron.pipeline.split import layers_of_stages
from dsv3_megatron.planning.memory.formulae import estimate_stages, stage_parameters
from dsv3_megatron.planning.memory.ranks import Held, fullest_moment, optimizer_bytes
from dsv3_megatron.planning.memory.stage_memory import StageMemory
from dsv3_megatron.planning.plan import make_plan
from launcher.command_line.compose import compose
from parallel.layout import Layout
from parallel.schedules import make_schedule
from testing.lanes import examples


def _stage(kept=100, deferred=0, forward=130, backward=170, weight=0, message=1):
    return StageMemory(0, 0, 0, kept, 0, deferred, forward, backward, weight, message)


def test_1f1b_is_fullest_with_one_microbatch_a_later_stage_and_one_in_backward():
    stages = [_stage()] * 4
    for rank in range(4):
        peak, at = fullest_moment(make_schedule("1f1b", 4, 8), rank, stages)
        # 4 - rank microbatches live: all but one keep 100, the one in backward peaks at 170.
        assert (peak, at.kind) == ((3 - rank) * 100 + 170, "B")


def test_weight_gradients_owed_hold_what_they_need_until_they_are_paid():
    schedule = make_schedule("zb1p", 2, 4)
    plain = fullest_moment(schedule, 0, [_stage(deferred=0)] * 2)[0]
    owing = fullest_moment(schedule, 0, [_stage(deferred=300, weight=310)] * 2)[0]
    assert owing > plain


def test_sends_stay_where_gloo_keeps_them():
    schedule, stages = make_schedule("1f1b", 2, 4), [_stage(message=7)] * 2
    without = fullest_moment(schedule, 0, stages)[0]
    # At the last backward of rank 0 three microbatches are done, and each has left one message in the outbox.
    assert fullest_moment(schedule, 0, stages, sends_stay=True)[0] - without <= 3 * 7
    assert fullest_moment(schedule, 0, stages, sends_stay=True)[0] > without


@pytest.mark.parametrize(
    ("words", "each"),
    # two float32 moments; a master and two BF16 moments, whatever the weights are
    [(["precision=fp32"], 8), (["precision=bf16"], 8), (["precision=fp32", "precision.moments=bf16"], 8)],
)
def test_optimizer_shard_is_by_hand(words, each):
    recipe = compose(["recipe=dsv3_tiny", *words])
    layout = Layout(dp=8, pp=2, ep=4, expert_dp=2)
    held = Held(dense=8000, experts=4000, in_fp8=0)
    assert optimizer_bytes(recipe, layout, held, copies=1) == each * (8000 / 8 + 4000 / 2)
    assert optimizer_bytes(recipe, layout, held, copies=2) == each * (8000 / 16 + 4000 / 4)


def test_stage_parameters_add_up_to_the_published_totals():
    recipe = compose(["recipe=dsv3_671b"])
    layout, layers = recipe.layout(2048), layers_of_stages(recipe)
    total = 0
    for stage in range(16):
        all_of_it, experts, _ = stage_parameters(recipe, layout, layers, stage)
        total += all_of_it - experts + experts * 64
    copied_embedding = 129280 * 7168  # the last stage's own, for MTP
    assert total - copied_embedding == 671_026_404_352 + 11_610_067_968


def _activations(recipe):
    layout, layers = recipe.layout(2048), layers_of_stages(recipe)
    schedule = schedule_of(recipe, 120)
    stages = estimate_stages(recipe, layout, layers, schedule)
    return [stage.kept for stage in stages]


@settings(max_examples=examples(8), deadline=None)
@given(
    st.sets(st.sampled_from(["norm", "mla_up", "moe_act", "shared_experts", "mlp"])),
    st.sampled_from(["norm", "mla_up", "moe_act", "shared_experts", "mlp"]),
    st.sampled_from(["fp8", "bf16"]),
)
def test_more_recomputation_never_keeps_more(names, one_more, precision):
    base = compose(["recipe=dsv3_671b"])
    if precision == "bf16":
        base = base.model_copy(update={"precision": base.precision.model_copy(update={"fp8": None})})

    def kept(recompute):
        parallel = base.parallel.model_copy(update={"recompute": tuple(recompute)})
        return _activations(base.model_copy(update={"parallel": parallel}))

    assert all(more <= less * 1.03 for more, less in zip(kept(names | {one_more}), kept(names)))


def test_more_expert_parallelism_never_holds_more_experts():
    experts = []
    for expert in (8, 32, 128):
        recipe = compose(["recipe=dsv3_671b", f"parallel.expert={expert}"])
        experts.append(make_plan(recipe, 2048, measure=estimate_stages).held[3].experts)
    assert experts == sorted(experts, reverse=True)
    assert experts[0] == 16 * experts[-1]
