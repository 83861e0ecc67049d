"""Every key of a pydantic model as a person reads it: name, kind, default, meaning. All who list keys read this."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

Model = type[BaseModel]
_KINDS = {str: "text", int: "integer", float: "number", bool: "true, false", Path: "path"}
_LIMITS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


@dataclass(frozen=True)
class Key:
    """One key, by the dotted name that a user writes."""

    name: str
    kind: str  # type and limits: "integer > 0 or null"; of a section ""
    default: str | None  # None: it must be given
    description: str
    section: Model | None = None  # whose keys lie below this one
    items: Model | None = None  # what a list or mapping holds: ``optim.learning_rate`` phases

    @property
    def is_section(self) -> bool:
        """Whether it holds keys, and no value of its own."""
        return self.section is not None


def keys_of(model: Model, prefix: str = "") -> Iterator[Key]:
    """Yield every key of a model, a section before the keys below it."""
    for name, field in fields_of(model).items():
        key = _key(prefix + name, field)
        yield key
        if key.section is not None:
            yield from keys_of(key.section, f"{key.name}.")


def items_of(model: Model) -> list[Model]:
    """Return the models that lists and mappings of a model hold, each once."""
    return list(dict.fromkeys(key.items for key in keys_of(model) if key.items is not None))


def fields_of(model: Model) -> dict[str, FieldInfo]:
    """Return the fields of a model by the names that a user writes."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def first_sentence(model: Model) -> str:
    """Return the first sentence of a model's docstring, "" where it has none of its own."""
    text = " ".join((model.__doc__ or "").split("\n\n")[0].split()).replace("``", "")
    return "" if text.startswith(f"{model.__name__}(") else text.rstrip(".")


def unknown_key(model: Model, parts: Sequence[str | int]) -> str | None:
    """Return what to say of a key that the model does not have, naming the nearest that exists; None: it has it.

    ``parts``: the key at its dots; a number is a place in a list, whose items are looked into.
    """
    section: Model | None = model
    for depth, part in enumerate(parts):
        if isinstance(part, int):
            continue
        if section is None:  # a mapping or a plain value: pydantic judges what is below it
            return None
        fields = fields_of(section)
        if part not in fields:
            return _nearest(model, parts, depth, fields)
        key = _key(part, fields[part])
        section = key.section or (key.items if any(isinstance(p, int) for p in parts[depth + 1 :]) else None)
    return None


def dotted(parts: Sequence[str | int]) -> str:
    """Return a key as it is written: ``optim.learning_rate[0].until``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")


def nearest(value: str, choices: Sequence[str], cutoff: float = 0.4) -> str:
    """Return "did you mean X? " for the choice nearest to a value, "" where none is near."""
    near = difflib.get_close_matches(value, choices, n=1, cutoff=cutoff)
    return f"did you mean {near[0]}? " if near else ""


def _nearest(model: Model, parts: Sequence[str | int], depth: int, fields: dict[str, FieldInfo]) -> str:
    near = difflib.get_close_matches(str(parts[depth]), fields, n=1, cutoff=0.6)
    if near:
        return f"did you mean {dotted([*parts[:depth], near[0]])}?"
    everywhere = [key.name for key in keys_of(model) if "." in key.name]
    elsewhere = [name for name in everywhere if name.split(".")[-1] == parts[-1]]
    elsewhere = elsewhere or difflib.get_close_matches(dotted(parts), everywhere, n=1, cutoff=0.75)
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    return f"it can be one of: {', '.join(fields)}"


def _key(name: str, field: FieldInfo) -> Key:
    section = _model_in(field.annotation)
    described = field.description or (first_sentence(section) if section else "")
    if section is not None:
        default = "null" if NoneType in get_args(field.annotation) else None
        return Key(name, "", default, described, section=section)
    kind = _kind(field.annotation, _limits(field.metadata))
    return Key(name, kind, _default(field), described, items=_items(field.annotation))


def _model_in(annotation: Any) -> Model | None:
    """Return the model that an annotation is, or is when it is not null."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _items(annotation: Any) -> Model | None:
    """Return the model of a list's or mapping's values, wherever it stands in an annotation."""
    if get_origin(annotation) in (tuple, list, dict):
        return next((found for a in get_args(annotation) if (found := _model_in(a))), None)
    return next((found for a in get_args(annotation) if (found := _items(a))), None)


def _default(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(str, value))}]"
    return str(value) or '""'


def _kind(annotation: Any, limits: str = "") -> str:
    """Return a type in a reader's words; limits stand with the part that they bind."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(arguments[0], limits or _limits(arguments[1:]))
    if origin is Literal:
        return ", ".join(str(a).lower() if isinstance(a, bool) else str(a) for a in arguments)
    if origin in (Union, UnionType):
        kinds = [_kind(a, limits) for a in arguments if a is not NoneType]
        return " or ".join(dict.fromkeys([*kinds, *(["null"] if NoneType in arguments else [])]))
    if origin in (tuple, list):
        return f"list of {_kind(arguments[0])}" if arguments else "list"
    if origin is dict:
        return f"mapping of {_kind(arguments[0])} to {_kind(arguments[1])}"
    return (_KINDS.get(annotation) or words_of(getattr(annotation, "__name__", str(annotation)))) + limits


def words_of(name: str) -> str:
    """Return the name of a class as words: ``MixturePhase``, mixture phase."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()


def _limits(metadata: Sequence[Any]) -> str:
    found = []
    for item in metadata:
        for part in getattr(item, "metadata", None) or (item,):
            found += [f"{sign} {getattr(part, name)}" for name, sign in _LIMITS.items() if hasattr(part, name)]
    return f" {', '.join(dict.fromkeys(found))}" if found else ""
