"""Recipe -> the pipeline schedule of a step."""

from __future__ import annotations

from dsv3_megatron.model.costs import stage_costs
from dsv3_megatron.pipeline.split import layers_of_stages
from dsv3_megatron.recipe import Recipe
from parallel.errors import ScheduleError
from parallel.pipeline.actions import Schedule
from parallel.pipeline.simulator import Times
from parallel.schedules import forward_only, make_schedule
from parallel.search import cached_search, search

# One stage of DeepSeek-V3 on H800s, milliseconds: derived from the repository's published profile and arXiv 2412.19437.
# Only their ratios matter here; the planner measures and prices stages properly.
_GPU = {"forward": 57.0, "input_grad": 82.0, "weight_grad": 42.0, "overlapped": 140.0}


def stage_times(recipe: Recipe) -> Times:
    """Return the relative times of the recipe's stages: what ``auto`` searches with."""
    layers = layers_of_stages(recipe)
    on_gpu = recipe.cluster.device != "cpu"
    return Times.of(
        len(layers), cost=stage_costs(recipe.model, layers, recipe.data.sequence_length), **(_GPU if on_gpu else {})
    )


def evaluation_schedule(recipe: Recipe, microbatches: int) -> Schedule:
    """Return the schedule that only runs forwards, over the placement that training has."""
    return forward_only(recipe.placement(microbatches))


def schedule_of(recipe: Recipe, microbatches: int) -> Schedule:
    """Return the schedule of a step of so many microbatches.

    While the batch ramps up, DualPipe may have fewer microbatches than its formula needs (24 of 32 at the start of
    DeepSeek-V3's run): such a step runs the best that list scheduling finds over the same placement.
    Raises: ScheduleError: it cannot be made of these numbers.
    """
    parallel = recipe.parallel
    placement = recipe.placement(microbatches)
    if parallel.schedule == "auto":
        return cached_search(recipe.data.cache, placement, stage_times(recipe))
    try:
        return make_schedule(parallel.schedule, parallel.pipeline, microbatches, parallel.chunks)
    except ScheduleError:
        ramps = not isinstance(recipe.optim.global_batch, int)
        if not ramps or parallel.schedule not in ("dualpipe", "dualpipev") or microbatches % 2:
            raise
        return search(placement, stage_times(recipe), evaluations=0).schedule
