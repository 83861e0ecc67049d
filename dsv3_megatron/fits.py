"""Does a recipe fit the world that was started? Asked before torch, data or any process group is touched."""

from __future__ import annotations

from dsv3_megatron.recipe import Recipe
from parallel.errors import DoesNotFitError, RecipeError
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
    check_available(recipe)
    return layout


def check_available(recipe: Recipe) -> None:
    """Refuse what recipes can say but this version cannot do yet: nothing is trained differently from what was asked.

    Raises: RecipeError: naming the key, and what to set instead.
    """
    waiting = {
        "precision.fp8": (recipe.precision.fp8 is not None, "precision=bf16"),
        "model.topk_method": (recipe.model.topk_method == "capacity", "model.topk_method=noaux_tc"),
        "data.fim_rate": (recipe.data.fim_rate > 0, "data.fim_rate=0"),
        "data.isolate_documents": (recipe.data.isolate_documents, "data.isolate_documents=false"),
        "data.source": (recipe.data.source == "indexed", "data=stdlib or data=synthetic"),
        "checkpoint.asynchronous": (recipe.checkpoint.asynchronous, "checkpoint.asynchronous=false"),
    }
    for key, (asked, instead) in waiting.items():
        if asked:
            section, name = key.split(".")
            value = getattr(getattr(recipe, section), name)
            shown = value if isinstance(value, (str, int, float)) else "{...}"
            raise RecipeError(f"{key} = {shown} is not available yet; set {instead}")
