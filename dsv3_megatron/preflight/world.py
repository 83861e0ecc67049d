"""Does a recipe fit the world that was started? Asked before torch, data or any process group is touched."""

from __future__ import annotations

from collections.abc import Mapping

from dsv3_megatron.optim.regime import Regime
from dsv3_megatron.pipeline.schedule import schedule_of
from dsv3_megatron.recipe import Recipe
from parallel.errors import DoesNotFitError, LayoutError, ScheduleError
from parallel.layout import Layout
from parallel.world import World

OVERLAPPING = ("dualpipe", "dualpipev", "auto")


def check_world(recipe: Recipe, world: World) -> Layout:
    """Return the layout of the recipe on this world, or raise what a user can fix, before any process group exists.

    Raises: DoesNotFitError: the recipe is made for a cluster and this is not one. LayoutError: degrees do not divide.
    """
    needed = recipe.cluster.world_size
    smallest = recipe.parallel.pipeline * max(
        recipe.parallel.tensor * recipe.parallel.context, recipe.parallel.expert * recipe.parallel.expert_tensor
    )
    if world.size < smallest and needed:
        raise DoesNotFitError(
            f"recipe={recipe.recipe} is made for {needed:,} GPUs (cluster={recipe.cluster.name}) and needs at least "
            f"{smallest:,} ranks (PP {recipe.parallel.pipeline} x EP {recipe.parallel.expert}), but there "
            f"{'is 1 process' if world.size == 1 else f'are {world.size} processes'}; start it on such a cluster, or "
            "train recipe=dsv3_tiny here"
        )
    layout = recipe.layout(world.size)
    check_schedule(recipe, layout)
    return layout


def check_queues(recipe: Recipe, variables: Mapping[str, str]) -> None:
    """Refuse the one queue between host and GPU that is advised for tensor parallelism on Hopper: with a pipeline it
    can hang (docs/schedules.md). ``variables``: of the environment of ranks on GPUs. Raises: LayoutError.
    """
    if variables.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1" and recipe.parallel.pipeline > 1:
        raise LayoutError(
            f"CUDA_DEVICE_MAX_CONNECTIONS = 1 beside parallel.pipeline = {recipe.parallel.pipeline} can hang: a stream "
            "that waits for a message holds the work that lets it come; set 8 or 32"
        )


def check_schedule(recipe: Recipe, layout: Layout) -> None:
    """Make the schedule of the first step, so that what it refuses is refused now.

    Raises: ScheduleError: in terms of the recipe's keys. LayoutError: recomputation that the schedule would not do.
    """
    parallel, optim = recipe.parallel, recipe.optim
    sequences = optim.micro_batch * layout.dp
    batches = {Regime(optim, recipe.data.sequence_length).global_batch(0)}
    if not isinstance(optim.global_batch, int):
        batches.add(optim.batch_multiple * max(1, -(-max(batches) // optim.batch_multiple)) + optim.batch_multiple)
    for batch in sorted(batches):
        try:
            schedule_of(recipe, batch // sequences)
        except ScheduleError as error:
            raise ScheduleError(
                f"parallel.schedule = {parallel.schedule} over parallel.pipeline = {parallel.pipeline} ranks: "
                f"{error.args[0]}; microbatches are a batch of {batch} sequences / (optim.micro_batch = "
                f"{optim.micro_batch} x {layout.dp} data-parallel ranks)"
            ) from None
    if parallel.schedule not in OVERLAPPING:
        return
    if bypassed := {"full", "moe"} & set(parallel.recompute):
        raise LayoutError(
            f"parallel.recompute = [{', '.join(sorted(bypassed))}] has no effect under parallel.schedule="
            f"{parallel.schedule}, whose overlapped plan calls the parts of a layer one by one; "
            "use some of [norm, mla_up, attention, moe_act, shared_experts, mlp]"
        )
    if recipe.model.num_nextn_predict_layers and not recipe.model.num_moe_layers:
        raise LayoutError(
            f"model.first_k_dense_replace = {recipe.model.first_k_dense_replace} leaves no MoE layer, and MTP under "
            f"parallel.schedule={parallel.schedule} needs one (megatron-core's overlapped plan); use zb1p"
        )
