"""What is frozen takes no gradient buffer and no optimizer state: real runs against the plan, to the byte."""

import pytest
import torch

from dsv3_megatron.checkpoint.optimizer_states import prepare_moments, states_of
from dsv3_megatron.planning.memory.formulae import estimate_stages
from dsv3_megatron.planning.memory.te_gradients import placeholder_bytes
from dsv3_megatron.planning.plan import make_plan
from dsv3_megatron.train.build import build_parts
from launcher.command_line.compose import compose
from parallel.groups import start_processes, stop_processes
from parallel.world import World
from testing.ranks import run_ranks
from testing.training.tiny import small_recipe

WORDS = ("model.num_hidden_layers=4", "optim.micro_batch=1", "data.sequence_length=16")
FREEZES = ("[]", "[experts,router]", "[embedding,layers.0-2,norms]", "[head,mtp,layers.1-3]", "[embedding,norms]")
LAYOUTS = {
    1: (),
    2: ("parallel.pipeline=2", "parallel.schedule=1f1b"),
    4: ("parallel.pipeline=2", "parallel.schedule=dualpipe", "parallel.expert=2"),
}


def held(overrides):
    """Return (pipeline rank, bytes of weights, of gradient buffers without padding, of optimizer states) of a rank."""
    recipe, world = small_recipe(*overrides), World.from_environment()
    start_processes(world, torch.device("cpu"), timeout_seconds=120)
    try:
        parts = build_parts(recipe, recipe.layout(world.size), torch.device("cpu"))
        prepare_moments(parts.optimizer)
        weights = {p: p.nbytes for chunk in parts.chunks.values() for p in chunk.parameters()}
        buffers = [b for ddp in parts.ddps.values() for b in ddp.buffers + ddp.expert_parallel_buffers]
        gradients = sum(p.main_grad.nbytes for buffer in buffers for p in buffer.params)
        padding = 4 * sum(64 * len(buffer.params) + 128 * world.size for buffer in buffers)  # where parameters begin
        assert sum(buffer.grad_data.nbytes for buffer in buffers) <= gradients + padding
        assert all(not hasattr(p, "main_grad") for p in weights if not p.requires_grad)
        states = [x for each in states_of(parts.optimizer).values() for name, x in each.items() if name != "param"]
        masters = [each["param"] for each in states_of(parts.optimizer).values()]
        low = recipe.precision.parameters == "bf16"  # else the weights are their own masters
        updated = sum(x.nbytes for x in (*states, *(masters if low else ())))
        return parts.groups.pp.rank(), sum(weights.values()), gradients, updated
    finally:
        stop_processes()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("world", LAYOUTS)
def test_bytes_held_are_those_of_the_plan(world, precision):
    asked = [(*WORDS, *LAYOUTS[world], f"precision={precision}", f"model.freeze={freeze}") for freeze in FREEZES]
    for words, ranks in zip(asked, run_ranks(world, held, asked)):
        plan = make_plan(small_recipe(*words), world, measure=estimate_stages)
        for planned in plan.ranks:
            mine = [rank for rank in ranks if rank[0] == planned.pipeline_rank]
            assert {(w, g) for _, w, g, _ in mine} == {(planned.weights_bytes, planned.gradients_bytes)}, words
        total = sum(rank[3] for rank in ranks)  # shards are padded, and so not all of one size; together they are whole
        assert total == pytest.approx(sum(r.optimizer_bytes for r in plan.ranks) * world // len(plan.ranks), abs=world)


def test_transformer_engine_keeps_no_placeholder_of_what_is_frozen():
    def placeholders(freeze):
        recipe = compose(["recipe=dsv3_16b", "backend=te", f"model.freeze={freeze}"])
        return placeholder_bytes(recipe, recipe.layout(8), range(1))

    parts = ("attention", "dense", "experts", "shared_experts")
    assert placeholders(f"[{','.join(parts)}]") == 0
    for part in parts:
        assert 0 < placeholders(f"[{part}]") < placeholders("[]")
    assert placeholders("[layers.0-26]") == 0 and placeholders("[layers.0-25]") > 0


def test_frozen_parts_have_no_weight_gradient_in_the_plans_time_and_traffic():
    def plan(*words):
        return make_plan(compose(["recipe=dsv3_671b", "precision=fp8", *words]), 2048, measure=estimate_stages)

    free, experts, layers = plan(), plan("model.freeze=[experts]"), plan("model.freeze=[layers.4-60,mtp]")
    for frozen, count in ((experts, experts.parameters.frozen), (layers, layers.parameters.frozen)):
        assert frozen.step.seconds < free.step.seconds and count > 0
        for name in ("gradient reduce-scatter", "weight all-gather"):
            assert frozen.traffic()[name].seconds < free.traffic()[name].seconds
        assert frozen.tightest.total_bytes < free.tightest.total_bytes
        assert frozen.step.optimizer_seconds < free.step.optimizer_seconds
    stage = layers.priced_model.stage(8)
    assert stage.weight_grad.kernels == 0 < free.priced_model.stage(8).weight_grad.kernels
    assert stage.forward.kernels < free.priced_model.stage(8).forward.kernels  # nothing is cut by columns for later
    assert plan("model.freeze=[embedding]").traffic()["embedding all-reduce"].seconds == 0
