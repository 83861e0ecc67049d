"""What the planner says a microbatch holds, against what real runs hold: tensors counted while they train."""

import gc

import pytest
import torch

from dsv3_megatron.pipeline.schedule import schedule_of
from dsv3_megatron.pipeline.split import layers_of_stages
from dsv3_megatron.planning.memory.activations import measure_stages
from dsv3_megatron.planning.memory.ranks import fullest_moment
from dsv3_megatron.train.build import build_parts
from dsv3_megatron.train.step import run_pipeline
from parallel.groups import start_processes, stop_processes
from parallel.pipeline.live_memory import LiveMemory
from parallel.world import World
from testing.ranks import run_ranks
from testing.training.tiny import small_recipe, step_batches_of

WIDER = ("data.sequence_length=128", "optim.micro_batch=2", "optim.global_batch=16")
CASES = [
    (1, [("parallel.recompute=[norm,mla_up,moe_act]",)]),
    (2, [("parallel.pipeline=2", "parallel.schedule=dualpipe"), ("parallel.tensor=2", "parallel.expert=2")]),
    pytest.param(1, [("parallel.recompute=[]",)], marks=pytest.mark.full),
    pytest.param(
        2,
        [
            ("parallel.pipeline=2", "parallel.schedule=1f1b"),
            ("parallel.expert=2",),
            ("parallel.context=2",),
            ("parallel.context=2", "parallel.recompute=[norm,mla_up,moe_act]", "optim.micro_batch=4"),
        ],
        marks=pytest.mark.full,
    ),
]


def _recipe(overrides):
    return small_recipe(*WIDER, *overrides)


def measured(overrides):
    """Return (most bytes alive in a step, passes run, most microbatches live) of this rank."""
    recipe, world = _recipe(overrides), World.from_environment()
    start_processes(world, torch.device("cpu"), timeout_seconds=200)
    try:
        parts = build_parts(recipe, recipe.layout(world.size), torch.device("cpu"))
        batches = step_batches_of(parts)
        run_pipeline(parts, batches, training=True)
        gc.collect()
        live, passes, memory = [], [0], LiveMemory()

        def counted(run):
            def counted_run(*tasks):
                passes[0] += len(tasks)
                run(*tasks)
                live.append(len(parts.stages._live))

            return counted_run

        for name in ("forward", "backward", "forward_backward"):
            setattr(parts.stages, name, counted(getattr(parts.stages, name)))
        gc.disable()
        with memory:
            run_pipeline(parts, batches, training=True)
        gc.enable()
        rank = parts.groups.pp.rank()
        return memory.peak_bytes, passes[0], max(live), rank
    finally:
        stop_processes()


@pytest.mark.parametrize(("world", "layouts"), CASES)
def test_predicted_activations_are_those_of_a_run_within_five_percent(world, layouts):
    for overrides, ranks in zip(layouts, run_ranks(world, measured, layouts)):
        recipe = _recipe(overrides)
        layout, layers = recipe.layout(world), layers_of_stages(recipe)
        many = recipe.optim.global_batch // (recipe.optim.micro_batch * layout.dp)
        schedule = schedule_of(recipe, many)
        stages = measure_stages(recipe, layout, layers, schedule)
        for peak, passes, live, rank in ranks:
            predicted, at = fullest_moment(schedule, rank, stages, sends_stay=True)
            print(overrides, rank, peak, predicted, predicted / peak - 1, at, passes, live)
            assert predicted == pytest.approx(peak, rel=0.05), (overrides, rank, str(at))
            assert passes == sum(part.kind != "W" for step in schedule.ranks[rank] for part in step.parts)
            assert live in (schedule.peak_microbatches[rank], schedule.peak_microbatches[rank] - 1)
