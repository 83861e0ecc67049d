"""key=value arguments of the commands that take no recipe."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from parallel.errors import RecipeError

T = TypeVar("T", bound=BaseModel)


def parse_arguments(model: type[T], arguments: Sequence[str]) -> T:
    """Return ``key=value`` words as a typed object.

    Raises: RecipeError: an unknown key (naming the nearest), a value of a wrong kind, a key that is missing.
    """
    values: dict[str, Any] = {}
    keys = _keys(model)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise RecipeError(f"{argument!r} is not key=value; keys are: {', '.join(keys)}")
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else f"keys are: {', '.join(keys)}"
            raise RecipeError(f"{key} is not a key of this command; {hint}")
        values[key] = value
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        if first["type"] == "missing":
            raise RecipeError(f"{key} is missing; add {key}=... ({keys[key].description})") from None
        raise RecipeError(f"{key} = {first['input']}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None


def _keys(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields by the names a user writes."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def arguments_help(description: str, model: type[BaseModel]) -> str:
    """Return the ``--help`` of a command: what it does, and its keys."""
    lines = [description.strip(), "", "Keys"]
    for name, field in _keys(model).items():
        default = "required" if field.is_required() else f"{field.default}"
        lines.append(f"  {name:<18} {field.description or ''} [{default}]")
    return "\n".join(lines)
