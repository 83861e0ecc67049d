"""What of the host a container sees: every place that the recipe names, by the name that it has there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dsv3_megatron.recipe import Recipe
from launcher.command_line.recipe_files import IS_CHECKOUT, ROOT
from parallel.errors import ClusterError

# Keys of a recipe whose values are places that a run reads or writes, beside its own directory.
PATH_KEYS = ("run.start_from", "data.path", "data.cache", "data.tokenizer", "data.exclude", "evaluate.tasks",
             "checkpoint.load")  # fmt: skip
MEMORY = (
    "checkpoint.memory_path"  # likewise, where states are kept in memory: a container may have a /dev/shm of its own
)


def paths_of(recipe: Recipe, overrides: Sequence[str]) -> dict[str, str]:
    """Return the places outside its own directory that a run needs: what names each -> the place as it is written.

    ``overrides``: that make the recipe; they may name recipe files.
    """
    places: dict[str, str] = {}
    for key in PATH_KEYS:
        section, name = key.split(".")
        value = getattr(getattr(recipe, section), name)
        for number, place in enumerate(value if isinstance(value, tuple) else [value] if value else []):
            places[f"{key}[{number}]" if isinstance(value, tuple) else key] = place
    if recipe.checkpoint.memory_every_steps:
        places[MEMORY] = recipe.checkpoint.memory_path
    for word in overrides:
        key, _, value = word.partition("=")
        if key == "recipe" and value.endswith((".yaml", ".yml")):
            places["recipe"] = value
        elif key.lstrip("+") == "hydra.searchpath":
            places |= {
                f"hydra.searchpath[{n}]": found for n, found in enumerate(re.findall(r"file://([^,'\"\]]+)", value))
            }
    return places


def mounts_of(
    given: Sequence[str], working_directory: Path, directories: Iterable[Path], places: Iterable[Mapping[str, str]]
) -> tuple[list[str], bool]:
    """Return the mounts (``HOST:CONTAINER``) of a job, and whether they leave out the directory of one of its runs.

    ``given``: cluster.slurm.mounts, which come last and are kept as they are: a place that the container sees by one of
    them is not mounted again, nor is one below another. ``directories``: of the job's runs. ``places``: of its runs.
    Raises: ClusterError: naming what cannot be mounted.
    """
    theirs = [mount if ":" in mount else f"{mount}:{mount}" for mount in given]
    seen = [Path(mount.split(":")[1]) for mount in theirs]
    named = {"the working directory": str(working_directory)}
    if IS_CHECKOUT:
        named["the checkout"] = str(ROOT)
    for more in places:
        named |= {f"{key} = {place}": place for key, place in more.items()}
    mine: list[Path] = []
    for what, place in named.items():
        path = _mountable(what, place, working_directory)
        if not _is_seen(path, seen) and path not in mine:
            mine.append(path)
    mine = [path for path in mine if not _is_seen(path, [other for other in mine if other != path])]
    runs = [_mountable(f"run.directory = {place}", str(place), working_directory) for place in directories]
    left_out = not all(_is_seen(path, [*seen, *mine]) for path in runs)
    return list(dict.fromkeys([*(f"{path}:{path}" for path in mine), *theirs])), left_out


def absolute_caches(places: Iterable[Mapping[str, str]]) -> list[str]:
    """Return the caches that lie outside the working directory, which a run makes, but a mount needs before."""
    caches = (more.get("data.cache", "") for more in places)
    return list(dict.fromkeys(cache for cache in caches if cache.startswith("/")))


def _is_seen(path: Path, places: Sequence[Path]) -> bool:
    return any(path.is_relative_to(place) for place in places)


def _mountable(what: str, place: str, working_directory: Path) -> Path:
    """Return a place as the job finds it; links stay, since it is opened by this name."""
    path = Path(os.path.normpath(working_directory / place))
    if path == Path("/"):
        raise ClusterError(f"{what} is / here, and mounting that would hide the container; work in a folder of its own")
    if found := re.search(r"[,:\x00-\x1f]", str(path)):
        raise ClusterError(
            f"{what} cannot be mounted into a container: {found[0]!r} ends a path in a list of mounts; rename {path}"
        )
    return path
