"""--multirun: every combination of the values of a sweep, each a run of its own."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from itertools import islice, product
from pathlib import Path

from dsv3_megatron.recipe import Recipe
from dsv3_megatron.run.handed import real_path
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
    """Return every combination's recipe, checked, with the overrides that make it: each with a run of its own.

    Raises: UserError: what is wrong with one of them. RecipeError: two of them are equal, or share a directory.
    """
    points = sweep(overrides)
    varying = [i for i in range(len(points[0]))] if points else []
    varying = [i for i in varying if len({point[i] for point in points}) > 1]
    composed = [compose(point) for point in points]
    # As Hydra writes them, 1e-5 and 0.00001 are one text; as the recipe reads them, so are 1K and 1000.
    _check_apart(overrides, points, [recipe.model_dump_json() for recipe in composed], "are the same run")
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
    places = [str(real_path(Path(recipe.run.directory))) for recipe, _ in recipes]
    _check_apart(overrides, points, places, "share run.directory = {}")
    return recipes


def _check_apart(overrides: Sequence[str], points: list[list[str]], marks: list[str], what: str) -> None:
    """Refuse two points with the same mark: the second would go on with the run of the first, or end at once."""
    first: dict[str, int] = {}
    for number, mark in enumerate(marks):
        if (other := first.setdefault(mark, number)) != number:
            swept = [i for i, override in enumerate(map(parsed_override, overrides)) if override.is_sweep_override()]
            both = [" ".join(points[n][i] for i in swept) for n in (other, number)]
            raise RecipeError(
                f"--multirun: points {other + 1} ({both[0]:.200}) and {number + 1} ({both[1]:.200}) "
                f"{what.format(mark)}; leave one out, or give each a run.directory of its own"
            )


def run_many(main: Callable[[Recipe], int | None], overrides: Sequence[str]) -> int:
    """Run every combination, one after another, each in a run directory of its own; stop at the first failure."""
    recipes = recipes_of_sweep(overrides)  # all are checked before the first starts
    for number, (recipe, _) in enumerate(recipes):
        print(f"[{number + 1}/{len(recipes)}] {recipe.run.name}", file=sys.stderr)
        if code := main(recipe) or 0:
            return code
    return 0
