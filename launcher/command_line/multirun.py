"""--multirun: every combination of the values of a sweep, each a run of its own."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from itertools import islice, product

from dsv3_megatron.recipe import Recipe
from launcher.command_line.compose import compose, parsed_override
from launcher.command_line.overrides import quoted
from parallel.errors import RecipeError

MOST_POINTS = 1000


def sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Return one list of overrides for every combination of the swept values (``a=1,2``).

    Raises: RecipeError: one cannot be read, or there are more than a thousand combinations.
    """
    choices = []
    for override in map(parsed_override, overrides):
        key = override.get_key_element()
        if override.is_sweep_override():
            values = islice(override.sweep_string_iterator(), MOST_POINTS + 1)
            choices.append([f"{key}={value}" for value in values])
        else:
            choices.append([str(override.input_line)])
        if math.prod(map(len, choices)) > MOST_POINTS:
            raise RecipeError(
                f"--multirun: {override.input_line} makes more than {MOST_POINTS:,} runs; sweep fewer values"
            )
    return [list(point) for point in product(*choices)]


def recipes_of_sweep(overrides: Sequence[str]) -> list[tuple[Recipe, list[str]]]:
    """Return every combination's recipe, checked, with the overrides that make it: each with a run of its own."""
    points = sweep(overrides)
    varying = [i for i in range(len(points[0]))] if points else []
    varying = [i for i in varying if len({point[i] for point in points}) > 1]
    composed = [compose(point) for point in points]
    directories = {recipe.run.directory for recipe in composed}
    given = any(o.startswith("run.directory=") for point in points for o in point)
    apart = given and len(directories) == len(points)  # as run.directory=runs/of_${optim.name} says
    recipes = []
    for recipe, point in zip(composed, points):
        suffix = ",".join(point[i] for i in varying).replace("/", "_")
        if suffix and not apart:
            named = {"name": f"{recipe.run.name}-{suffix}", "directory": f"{recipe.run.directory}-{suffix}"}
            recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update=named)})
            point = [*point, *(f"run.{key}={quoted(value)}" for key, value in named.items())]
        recipes.append((recipe, point))
    return recipes


def run_many(main: Callable[[Recipe], int | None], overrides: Sequence[str]) -> int:
    """Run every combination, one after another, each in a run directory of its own; stop at the first failure."""
    recipes = recipes_of_sweep(overrides)  # all are checked before the first starts
    for number, (recipe, _) in enumerate(recipes):
        print(f"[{number + 1}/{len(recipes)}] {recipe.run.name}", file=sys.stderr)
        if code := main(recipe) or 0:
            return code
    return 0
