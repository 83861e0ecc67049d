"""search=true: layouts ranked in a table, the winner as a recipe file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from dsv3_megatron.planning.plan import missing_facts
from dsv3_megatron.planning.search import Found, other_degrees, search_layouts, why_it_wins
from dsv3_megatron.recipe import Recipe
from dsv3_megatron.run.terminal import rewrite
from launcher.command_line.output import write_output
from launcher.command_line.recipe_files import GROUPS, IS_CHECKOUT, RECIPES
from launcher.command_line.typed import as_typed
from parallel.errors import DoesNotFitError, RecipeError
from parallel.units import GIB


def search_run(recipe: Recipe, world: int | None, overrides: Sequence[str], *, top: int, save: str | None) -> int:
    """Search, print the best, write the winner; return 0, or raise what a user can fix.

    ``top``: rows of the table. ``save``: name of the winner among the recipes; None = a file of the current folder.
    """
    world = world or recipe.cluster.world_size or 1

    if missing := missing_facts(recipe):
        raise RecipeError(
            f"cluster.{missing} is not given by cluster={recipe.cluster.name}, and layouts are ranked by time"
        )
    start = time.monotonic()
    own, found, tried = search_layouts(recipe, world, progress=_progress())
    print(
        f"recipe={recipe.recipe} cluster={recipe.cluster.name}: {tried} layouts of {world:,} GPUs tried in "
        f"{time.monotonic() - start:.0f} s, {len(found)} can be, {sum(f.fits for f in found)} fit"
    )
    print("\n".join(table(found[:top], own)))
    if not found or not found[0].fits:
        raise DoesNotFitError(
            f"no layout of {world:,} GPUs fits cluster={recipe.cluster.name}; take more or larger GPUs"
        )
    if own is not None:
        if not own.fits:
            print(f"\nthe recipe's own does not fit: {own.largest_bytes / GIB:.1f} GiB")
        elif found[0].seconds < own.seconds * 0.9995:
            print("\nthe first is " + why_it_wins(found[0], own, "the recipe's own"))
        else:
            print("\nnone beats the recipe's own")
    if (other := other_degrees(found)) is not None:
        print(f"the first is {why_it_wins(found[0], other, 'the next of other degrees')}")
    name = save or f"{recipe.recipe}_searched"
    path = saved_recipes() / f"{name}.yaml" if save else Path(f"{name}.yaml")
    write_output(path, recipe_file(recipe, overrides, found[0], name), "save")
    print(f"the first as a recipe: {path}")
    return 0


def saved_recipes() -> Path:
    """Return the folder that ``recipe=NAME`` will find a saved recipe in: a checkout's own, else ./recipes/recipe."""
    folder = RECIPES / "recipe" if IS_CHECKOUT else Path("recipes", "recipe")
    with suppress(OSError):  # the write names what is wrong
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def table(found: Sequence[Found], own: Found | None) -> list[str]:
    """Return the ranked layouts, the recipe's own last."""
    lines = ["  step s  bubble s    GiB  fits  overrides"]
    for row in [*found, *([own] if own else [])]:
        words = " ".join(word.removeprefix("parallel.") for word in row.overrides) or "(the recipe's own)"
        lines.append(
            f"  {row.seconds:6.2f}  {row.bubble_seconds:8.2f}  {row.largest_bytes / GIB:5.1f}  "
            f"{'yes' if row.fits else 'no':<4}  {words}"
        )
    return lines


def recipe_file(recipe: Recipe, overrides: Sequence[str], found: Found, name: str) -> str:
    """Return a recipe that is the given one, with what else was asked for and the layout found."""
    given = dict(word.split("=", 1) for word in overrides if "=" in word)
    layout = dict(word.split("=", 1) for word in found.overrides)
    if layout:
        layout.setdefault("parallel.stages", "null")
    groups = {key: value for key, value in given.items() if key in GROUPS and key not in ("recipe", "cluster")}
    keys = {**{key: value for key, value in given.items() if key not in (*GROUPS, "recipe")}, **layout}
    command = as_typed(f"python launcher/plan.py {' '.join(overrides)} search=true")
    lines = [
        "# @package _global_",
        f"# Found by {command}: {found.seconds:.2f} s a step, not measured.",
        "defaults:",
        f"  - {recipe.recipe}",
        *(f"  - override /{group}: {choice}" for group, choice in groups.items()),
        f"  - override /cluster: {recipe.cluster.name}",
        "  - _self_",
        "",
        f"recipe: {name}",
        *_nested(keys),
    ]
    return "\n".join(lines) + "\n"


def _nested(keys: dict[str, str]) -> list[str]:
    """Return dotted keys as YAML, sections in the order in which they first appear."""
    sections: dict[str, dict[str, str]] = {}
    for key, value in keys.items():
        section, _, rest = key.partition(".")
        sections.setdefault(section, {})[rest] = value
    lines = []
    for section, fields in sections.items():
        if "" in fields:  # no section: a key with its value
            lines.append(f"{section}: {fields['']}")
        else:
            lines += [f"{section}:", *(f"  {line}" for line in _nested(fields))]
    return lines


def _progress() -> Callable[[str, int, int], None]:
    if not sys.stderr.isatty():
        return lambda *of: None

    def show(name: str, done: int, of: int) -> None:
        rewrite(sys.stderr, f"{name} {done}/{of}", end="\n" if done == of else "")

    return show
