"""Can a layout be, and on how many ranks? Asked before anything is built; no torch."""

from __future__ import annotations

from dsv3_megatron.fits import check_schedule
from dsv3_megatron.recipe import Recipe
from parallel.errors import LayoutError


def world_of(recipe: Recipe, asked: int | None = None) -> int:
    """Return the ranks to plan for: what was asked, the cluster's, or the fewest that the layout needs.

    Raises: LayoutError: the cluster is smaller than the layout, or than what was asked.
    """
    parallel, cluster = recipe.parallel, recipe.cluster
    dense, experts = parallel.tensor * parallel.context, parallel.expert * parallel.expert_tensor
    stage = dense
    while stage % experts:
        stage += dense
    least = parallel.pipeline * stage
    world = asked or cluster.world_size or least
    if cluster.world_size and world > cluster.world_size:
        raise LayoutError(
            f"world = {world:,}, but cluster={cluster.name} has {cluster.world_size:,} GPUs; "
            f"ask for {cluster.world_size} or fewer, or raise cluster.nodes"
        )
    if world < least:
        raise LayoutError(
            f"parallel.pipeline = {parallel.pipeline} x parallel.expert = {parallel.expert} needs {least:,} GPUs, but "
            f"cluster={cluster.name} has {world:,}; lower one of the two, or take a larger cluster"
        )
    return world


def check_layout(recipe: Recipe, world: int) -> None:
    """Raise what a user can mend: degrees, batch, schedule, recomputation."""
    check_schedule(recipe, recipe.layout(world))
