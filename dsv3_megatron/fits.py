"""Does a recipe fit the world that was started? Asked before torch, data or any process group is touched."""

from __future__ import annotations

from dsv3_megatron.recipe import Recipe
from parallel.errors import DoesNotFitError, LayoutError
from parallel.layout import Layout
from parallel.world import World


def check_world(recipe: Recipe, world: World) -> Layout:
    """Return the layout of the recipe on this world, or raise what a user can mend, before any process group exists.

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
    if recipe.parallel.schedule not in ("1f1b",) and recipe.parallel.pipeline > 1:
        raise LayoutError(
            f"parallel.schedule = {recipe.parallel.schedule} is not available yet; set parallel.schedule=1f1b"
        )
    return layout
