"""What ``--help`` prints: what a command does, its keys, and for commands that take a recipe all of its keys too."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from pydantic import BaseModel

from dsv3_megatron.recipe import Recipe
from launcher.command_line.recipe_files import GROUPS, options, own_folders
from launcher.command_line.schema import Key, first_sentence, items_of, keys_of, words_of
from launcher.command_line.typed import as_typed

_NAME, _WIDTH = 36, 118  # columns
_FLAGS = """
Flags: --cfg job prints the composed recipe, --multirun (-m) runs every combination of key=a,b. Files of your own are
found in ./recipes (such as ./recipes/recipe/mine.yaml, then recipe=mine), or with hydra.searchpath=[file:///FOLDER].
""".strip()


def command_help(description: str, model: type[BaseModel] | None = None, *, with_recipe: bool = False) -> str:
    """Return the help of a command: its description, its own keys, and ``with_recipe`` groups and keys of a recipe."""
    lines = [as_typed(description.strip())]
    if model is not None:
        lines += ["", "Keys", *map(_line, keys_of(model))]
    if with_recipe:
        folders = own_folders()
        lines += ["", "Groups of a recipe (choose one of each: group=option)"]
        lines += [f"  {group:<10} {', '.join(options(group, folders))}" for group in GROUPS]
        lines += ["", "Keys of a recipe (set any: key=value)", *_recipe_lines(), "", _FLAGS]
    return "\n".join(lines)


def _recipe_lines() -> Iterator[str]:
    for key in keys_of(Recipe):
        if key.is_section:
            absent = " [null, or the keys below]" if key.default == "null" else ""
            yield _wrapped(f"{key.name}:", key.description + absent)
        else:
            yield _line(key)
    for model in items_of(Recipe):
        yield _wrapped(f"each {words_of(model.__name__)}:", first_sentence(model))
        yield from map(_line, keys_of(model))


def _line(key: Key) -> str:
    default = "" if key.default is None else f"; default {key.default}"
    return _wrapped(key.name, f"{key.description} [{key.kind}{default}]")


def _wrapped(name: str, text: str) -> str:
    """Return a name with a text beside it, in as many lines as it takes."""
    start = f"  {name:<{_NAME}} "
    return textwrap.fill(
        text, _WIDTH, initial_indent=start, subsequent_indent=" " * (_NAME + 3), break_on_hyphens=False
    )
