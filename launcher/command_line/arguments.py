"""The keys of a command as a typed object: the one way in which ``key=value`` words are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsv3_megatron.recipe import Recipe
from dsv3_megatron.run.made import Readers, for_owner
from launcher.command_line.help import command_help
from launcher.command_line.recipe_files import GROUPS
from launcher.command_line.schema import Key, keys_of, nearest, unknown_key
from parallel.errors import RecipeError

HELP = {"--help", "-h"}


class Arguments(BaseModel):
    """The keys of a command. Fields have descriptions; a field that is true or false may be written ``--field``."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


ReadableBy = Annotated[Readers, Field(description="who may read what is made: owner, or group for a team")]
T = TypeVar("T", bound=BaseModel)


def takes(model: type[T], description: str | None) -> Callable[[Callable[[T], int]], Callable[[Sequence[str]], int]]:
    """Make a function of typed arguments the ``main`` of a command that has no other keys; ``--help`` is answered."""

    def of(main: Callable[[T], int]) -> Callable[[Sequence[str]], int]:
        @wraps(main)
        def read(words: Sequence[str]) -> int:
            if HELP & set(words):
                print(command_help(description or "", model))
                return 0
            given = parse_arguments(model, words)
            if getattr(given, "readable_by", "owner") != "owner":
                for_owner("group")
            return main(given)

        return read

    return of


def takes_recipe(
    model: type[T], description: str | None
) -> Callable[[Callable[[T, list[str]], int]], Callable[[Sequence[str]], int]]:
    """As :func:`takes`, for a command whose other words are overrides of a recipe, which it gets as they stand."""

    def of(main: Callable[[T, list[str]], int]) -> Callable[[Sequence[str]], int]:
        @wraps(main)
        def read(words: Sequence[str]) -> int:
            if HELP & set(words):
                print(command_help(description or "", model, with_recipe=True))
                return 0
            own, overrides = split_words(model, words)
            return main(parse_arguments(model, own), overrides)

        return read

    return of


def split_words(model: type[BaseModel], words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return (words with a command's own keys, all others). Raises RecipeError for a misspelt key of its own."""
    keys = {key.name: key for key in keys_of(model)}
    own, others = [], []
    for word in words:
        name = word.partition("=")[0]
        if name in keys or _is_flag(word, keys):
            own.append(word)
            continue
        is_override = name in GROUPS or word.startswith("-") or not unknown_key(Recipe, name.lstrip("+~").split("."))
        if not is_override and (near := nearest(name, list(keys), cutoff=0.75)):
            raise RecipeError(f"{name} is not a key of this command or of a recipe; {near.rstrip()}")
        others.append(word)
    return own, others


def parse_arguments(model: type[T], words: Sequence[str]) -> T:
    """Return ``key=value`` words as a typed object; ``null`` is the value of a key that may be left out.

    Raises: RecipeError: an unknown key (naming the nearest), a value of a wrong kind, a key that is missing.
    """
    keys = {key.name: key for key in keys_of(model)}
    values: dict[str, str | None] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if _is_flag(word, keys):
            name, equals, value = word.removeprefix("--"), "=", "true"
        if not equals:
            raise RecipeError(f"{word!r} is not key=value; keys are: {', '.join(keys)}")
        if name not in keys:
            hint = nearest(name, list(keys)).rstrip() or f"keys are: {', '.join(keys)}"
            raise RecipeError(f"{name} is not a key of this command; {hint}")
        if name in values:
            raise RecipeError(f"{name} is given twice; leave one of the two out")
        if not value:
            raise RecipeError(f"{name} = is empty; write {name}=VALUE ({keys[name].kind}), or leave it out")
        values[name] = None if value == "null" and keys[name].default == "null" else value
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _as_one_line(error, keys) from None


def _is_flag(word: str, keys: dict[str, Key]) -> bool:
    """Whether a word is ``--key`` of a key that is true or false."""
    key = keys.get(word.removeprefix("--"))
    return word.startswith("--") and key is not None and key.kind == "true, false"


def _as_one_line(error: ValidationError, keys: dict[str, Key]) -> RecipeError:
    first = error.errors()[0]
    said = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:  # a rule between keys, which names them itself
        return RecipeError(said)
    name = str(first["loc"][0])
    if first["type"] == "missing":
        return RecipeError(f"{name} is missing; add {name}=... ({keys[name].description})")
    return RecipeError(f"{name} = {first['input']}: {said[:1].lower()}{said[1:]}; it can be: {keys[name].kind}")
