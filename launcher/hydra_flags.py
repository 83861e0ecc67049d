"""The flags Hydra users know: --help, --cfg job, --multirun, --info."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf

from dsv3_megatron.recipe import Recipe
from launcher.compose import GROUPS, compose, compose_config, options
from parallel.errors import RecipeError

FLAGS = ("--help", "-h", "--cfg", "-c", "--multirun", "-m", "--resolve", "--package", "-p")


def run_flags(main: Callable[[Recipe], int | None], arguments: Sequence[str], description: str) -> int:
    """Run a command line that holds flags; return the exit code. Raises RecipeError for an unknown flag."""
    overrides, flags, package = _split(arguments)
    if {"--help", "-h"} & flags:
        print(help_text(description))
        return 0
    if "--cfg" in flags:
        return _print_config(overrides, "--resolve" in flags, package)
    if "--multirun" in flags:
        return run_many(main, overrides)
    return main(compose(overrides)) or 0


def _split(arguments: Sequence[str]) -> tuple[list[str], set[str], str | None]:
    overrides, flags, package = [], set(), None
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        name, _, value = argument.partition("=")
        name = {"-c": "--cfg", "-m": "--multirun", "-p": "--package"}.get(name, name)
        if name not in FLAGS:
            raise RecipeError(
                f"{argument} is not a flag of this command; there are: --help, --cfg job, --multirun, --resolve"
            )
        if name == "--cfg":
            value = value or next(rest, "")
            if value not in ("job", "hydra", "all"):
                raise RecipeError(f"--cfg = {value or 'nothing'}; write --cfg job, which prints the composed recipe")
        if name == "--package":
            package = value or next(rest, None)
        flags.add(name)
    return overrides, flags, package


def _print_config(overrides: Sequence[str], resolve: bool, package: str | None) -> int:
    config = compose_config(overrides)
    if package:
        config = OmegaConf.select(config, package)
        if config is None:
            raise RecipeError(f"--package = {package} is not a section of the recipe; there are: {', '.join(GROUPS)}")
    print(OmegaConf.to_yaml(config, resolve=resolve), end="")
    return 0


def sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Return one list of overrides for every combination of the swept values (``a=1,2``)."""
    try:
        parsed: list[Override] = OverridesParser.create().parse_overrides(overrides=list(overrides))
    except HydraException as error:
        raise RecipeError(f"{str(error).splitlines()[0]}; write key=value or key=value1,value2") from None
    choices = []
    for override in parsed:
        key = override.get_key_element()
        if override.is_sweep_override():
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([override.input_line])
    return [list(point) for point in itertools.product(*choices)]


def quoted(value: object) -> str:
    """Return a value as an override takes it whatever it holds: spaces, commas, quotes, dollar signs."""
    text = str(value)
    if re.fullmatch(r"[A-Za-z0-9_./+-]+", text):
        return text
    # Backslashes are taken as they stand, but for those in front of a quote, which are doubled.
    text = re.sub(r"(\\*)'", lambda found: 2 * found[1] + "\\'", text)
    text = re.sub(r"(\\+)$", lambda found: 2 * found[1], text)
    return "'" + text.replace("${", "\\${") + "'"


def recipes_of_sweep(overrides: Sequence[str]) -> list[tuple[Recipe, list[str]]]:
    """Return every combination's recipe, checked, with the overrides that make it: each with a run of its own."""
    points = sweep(overrides)
    varying = [i for i in range(len(points[0]))] if points else []
    varying = [i for i in varying if len({point[i] for point in points}) > 1]
    recipes = []
    for point in points:
        recipe = compose(point)
        suffix = ",".join(point[i] for i in varying).replace("/", "_")
        if suffix and not any(o.startswith("run.directory=") for o in point):
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


def help_text(description: str) -> str:
    """Return what ``--help`` prints: what the command does, the groups with their options, the keys with help."""
    lines = [description.strip(), "", "Groups (choose one of each: group=option)"]
    lines += [f"  {group:<10} {', '.join(options(group))}" for group in GROUPS]
    lines += ["", "Keys (set any: key=value)"]
    lines += list(_key_lines(Recipe, ""))
    lines += [
        "",
        "Flags: --cfg job prints the composed recipe, --multirun (-m) runs every combination of key=a,b",
    ]
    return "\n".join(lines)


def _key_lines(section: type, prefix: str):
    from launcher.compose import _fields_of

    for name, field in section.model_fields.items():
        inner = _fields_of(field.annotation)
        if inner is not None and field.annotation.__class__ is type(section) and prefix == "":
            yield from _key_lines(field.annotation, f"{name}.")
            continue
        default = "" if field.is_required() else f" [{field.get_default(call_default_factory=True)}]"
        yield f"  {prefix + name:<34} {field.description or ''}{default}"
