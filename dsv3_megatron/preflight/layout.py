"""Can a layout be, and on how many ranks? Asked before anything is built; no torch."""

from __future__ import annotations

from itertools import product
from math import lcm, log2

from dsv3_megatron.preflight.world import check_schedule
from dsv3_megatron.recipe import Recipe
from parallel.errors import LayoutError, UserError


def world_of(recipe: Recipe, asked: int | None = None) -> int:
    """Return the ranks to plan for: what was asked, the cluster's, or the fewest that the layout needs.

    Raises: LayoutError: the cluster is smaller than the layout, or than what was asked.
    """
    parallel, cluster = recipe.parallel, recipe.cluster
    least = smallest_world(recipe)
    world = asked or cluster.world_size or least
    if cluster.world_size and world > cluster.world_size:
        raise LayoutError(
            f"world = {world:,}, but cluster={cluster.name} has {cluster.world_size:,} GPUs; "
            f"ask for {cluster.world_size} or fewer, or raise cluster.nodes"
        )
    if world < least:
        nearest = nearest_layout(recipe, world)
        fix = f"nearest that can be: {nearest}" if nearest else "lower one of the two, or take a larger cluster"
        raise LayoutError(
            f"parallel.pipeline = {parallel.pipeline} x parallel.expert = {parallel.expert} needs {least:,} GPUs, but "
            f"cluster={cluster.name} has {world:,}; {fix}"
        )
    return world


def smallest_world(recipe: Recipe) -> int:
    """Return the fewest ranks that the recipe's degrees can be laid out on."""
    parallel = recipe.parallel
    dense, experts = parallel.tensor * parallel.context, parallel.expert * parallel.expert_tensor
    return parallel.pipeline * lcm(dense, experts)


def nearest_layout(recipe: Recipe, world: int) -> str | None:
    """Return overrides of the nearest smaller degrees that ``world`` GPUs can have, or None: no halving of the
    recipe's degrees can be. Near is what takes fewest halvings."""
    parallel = recipe.parallel
    asked = (parallel.pipeline, parallel.expert, parallel.tensor)
    tries = sorted(
        product(*map(_halvings, asked)), key=lambda degrees: sum(log2(a / d) for a, d in zip(asked, degrees))
    )
    for pipeline, expert, tensor in tries:
        changes: dict[str, int | str | None] = {"pipeline": pipeline, "expert": expert, "tensor": tensor}
        if pipeline != parallel.pipeline:
            changes["stages"] = None
        if pipeline == 1:
            changes |= {"schedule": "1f1b", "chunks": 1}
        other = recipe.model_copy(update={"parallel": parallel.model_copy(update=changes)})
        try:
            other.check()
            check_layout(other, world)
        except UserError:
            continue
        changed = {key: value for key, value in changes.items() if value != getattr(parallel, key)}
        return " ".join(f"parallel.{key}={'null' if value is None else value}" for key, value in changed.items())
    return None


def _halvings(degree: int) -> list[int]:
    """Return the degree, its half, and so on while it is even."""
    found = [degree]
    while found[-1] % 2 == 0:
        found.append(found[-1] // 2)
    return found


def check_layout(recipe: Recipe, world: int) -> None:
    """Raise what a user can fix: degrees, batch, schedule, recomputation."""
    check_schedule(recipe, recipe.layout(world))
