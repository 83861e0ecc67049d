"""Where recipe files are: those shipped, and those of the user's own folders."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from parallel.errors import RecipeError

PACKAGE = Path(__file__).resolve().parent.parent  # launcher/
ROOT = PACKAGE.parent  # of a checkout; else the folder that packages are installed into
IS_CHECKOUT = not (PACKAGE / "recipes").is_dir()
DATA = ROOT if IS_CHECKOUT else PACKAGE  # where recipes/ and dashboards/ lie
RECIPES = DATA / "recipes"
GROUPS = ("recipe", "model", "parallel", "precision", "optim", "data", "cluster", "logging")


def own_folders(searchpath: Sequence[str] = ()) -> list[Path]:
    """Return the folders of recipe files beside the shipped ones: ``./recipes``, and the files of Hydra's searchpath.

    Raises: RecipeError: one of their files has the name of a shipped one and says something else, or a place of
    ``hydra.searchpath`` is no folder.
    """
    here = Path.cwd() / "recipes"
    folders = [here] if any((here / group).is_dir() for group in GROUPS) else []
    for place in searchpath:
        if not place.startswith("file://"):  # a package (pkg://), which Hydra finds by itself
            continue
        folder = Path(place.removeprefix("file://"))
        if not folder.is_dir():
            raise RecipeError(
                f"hydra.searchpath = {place} is no folder; write hydra.searchpath=[file:///FOLDER], whose folders are "
                f"{', '.join(GROUPS)}"
            )
        folders.append(folder)
    folders = [folder for folder in folders if folder.resolve() != RECIPES]
    for file in files_of(folders):
        shipped = RECIPES / file.parent.name / file.name
        if shipped.is_file() and shipped.read_bytes() != file.read_bytes():
            raise RecipeError(f"{file} has the name of a shipped file ({shipped}) and differs; rename it")
    return folders


def files_of(folders: Sequence[Path]) -> Iterator[Path]:
    """Yield the recipe files of folders, group by group."""
    for folder in folders:
        for group in GROUPS:
            yield from sorted((folder / group).glob("*.yaml"))


def check_numbers(file: Path) -> None:
    """Refuse numbers of a recipe file that YAML 1.1 reads otherwise than people: by sixties, and by eights.

    Raises: RecipeError: naming the first one, its line, and what to write.
    """
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return  # whoever reads the file says so
    for key, node in _plain_scalars(root, ""):
        text = node.value
        by_eights = re.fullmatch(r"[-+]?0[0-7_]+", text) is not None
        if ":" not in text and not by_eights:
            continue
        read = yaml.safe_load(text)
        if isinstance(read, str) or (by_eights and read == int(text)):
            continue
        name = key.rpartition(".")[2]
        fix = f"write {'' if name.isdecimal() else f'{name}: '}'{text}'"
        fix += f", or {int(text)} without the zero in front" if by_eights else " in quotes"
        place = f"{file}:{node.start_mark.line + 1}"
        raise RecipeError(f"{place}: {key} = {text} is the number {read} to YAML; {fix}")


def _plain_scalars(node: yaml.Node | None, key: str) -> Iterator[tuple[str, yaml.ScalarNode]]:
    """Yield the values without quotes that YAML takes for numbers, with their dotted keys."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield from _plain_scalars(value, f"{key}.{name.value}".lstrip("."))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _plain_scalars(value, f"{key}.{index}".lstrip("."))
    elif isinstance(node, yaml.ScalarNode) and node.style is None and node.tag.endswith((":int", ":float")):
        yield key, node


def options(group: str, folders: Sequence[Path] | None = None) -> list[str]:
    """Return the names that a group offers: the files of its folder among the shipped and the user's own."""
    places = [RECIPES, *(own_folders() if folders is None else folders)]
    return sorted({path.stem for place in places for path in (place / group).glob("*.yaml")})
