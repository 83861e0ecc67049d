"""Write docs/recipes.md: every group, file and key of a recipe, from the schema itself.

python launcher/reference.py [output=docs/recipes.md]      (make docs; a test keeps the page in step)
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from dsv3_megatron.recipe import Recipe
from launcher.arguments import arguments_help, parse_arguments
from launcher.compose import GROUPS, RECIPES, options
from launcher.console import guarded

_HEAD = """# Recipes: every key

<!-- Written by `python launcher/reference.py` (`make docs`); edit the settings it is made from, not this page. -->

```bash
python launcher/pretrain.py recipe=dsv3_tiny optim.learning_rate=1e-3 --cfg job   # what a command line comes to
```

A recipe is one file of `recipes/recipe/`; it picks a file of each group and says what differs. On the command line
`group=file` swaps a whole group and `section.key=value` sets one key. Counts take K, M, B, T (`14.8T`), sizes KiB, MiB,
GiB (`80GiB`). Values that change over a run (`optim.learning_rate`, `optim.global_batch`, ...) are a number or a
list of phases: `{until: 2000 steps, shape: linear, to: 2.2e-4}`.
"""


class Arguments(BaseModel):
    """Keys of the command."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    output: Path = Field(Path("docs/recipes.md"), description="file to write")


def main(arguments: Sequence[str]) -> int:
    """Write the page; return the exit code."""
    if {"--help", "-h"} & set(arguments):
        print(arguments_help(__doc__, Arguments))
        return 0
    output = parse_arguments(Arguments, arguments).output
    output.write_text(reference())
    print(output)
    return 0


def reference() -> str:
    """Return the page."""
    return "\n".join([_HEAD, *_groups(), *_sections()]) + "\n"


def _groups() -> Iterator[str]:
    yield "## Groups and their files\n"
    for group in GROUPS:
        yield f"### {group}\n\n| file | what it is |\n|---|---|"
        for name in options(group):
            what = _cell(_comment(RECIPES / group / f"{name}.yaml"))
            yield f"| [`{name}`](../recipes/{group}/{name}.yaml) | {what} |"
        yield ""


def _comment(path: Path) -> str:
    """Return the first sentence of the comment a recipe file begins with."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line.lstrip("# ").rstrip())
    return re.split(r"(?<=[a-z0-9)])[.;] ", " ".join(lines))[0].rstrip(".")


def _sections() -> Iterator[str]:
    yield "## Keys\n"
    for name, field in Recipe.model_fields.items():
        section = _section(field.annotation)
        if section is None:
            continue
        yield f"### {name}\n\n{_first_sentence(section)}\n\n| key | value | default | meaning |\n|---|---|---|---|"
        yield from _rows(section, f"{name}.")
        yield ""
    plain = [(n, f) for n, f in Recipe.model_fields.items() if _section(f.annotation) is None]
    yield "### outside of the sections\n\n| key | value | default | meaning |\n|---|---|---|---|"
    yield from (_row(name, field) for name, field in plain)


def _rows(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = _section(field.annotation)
        if inner is None:
            yield _row(prefix + name, field)
        else:
            yield from _rows(inner, f"{prefix}{name}.")


def _row(key: str, field: FieldInfo) -> str:
    annotation = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    return f"| `{key}` | {_cell(_kind(annotation))} | {_cell(_default(field))} | {_cell(field.description or '')} |"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True) if not field.is_required() else PydanticUndefined
    if value is PydanticUndefined:
        return ""
    if value is None:
        return "null"
    if isinstance(value, BaseModel):
        return "see its file"
    if isinstance(value, (tuple, list)):
        return f"`[{', '.join(str(v) for v in value)}]`" if len(str(value)) < 60 else "see its file"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _kind(annotation: Any) -> str:
    """Return a type in a reader's words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(arguments[0]) + _limits(arguments[1:])
    if origin is Literal:
        return ", ".join(f"`{a}`" for a in arguments)
    if origin in (Union, UnionType):
        kinds = [_kind(a) for a in arguments if a is not NoneType]
        return " or ".join(dict.fromkeys([*kinds, *(["null"] if NoneType in arguments else [])]))
    if origin in (tuple, list):
        return f"list of {_kind(arguments[0])}" if arguments else "list"
    if origin is dict:
        return f"mapping of {_kind(arguments[0])} to {_kind(arguments[1])}"
    names = {str: "text", int: "integer", float: "number", bool: "`true`, `false`", Path: "path"}
    return names.get(annotation) or getattr(annotation, "__name__", str(annotation)).lower()


def _limits(metadata: Sequence[Any]) -> str:
    words = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = []
    for item in metadata:
        for part in getattr(item, "metadata", None) or (item,):
            found += [f"{sign} {getattr(part, name)}" for name, sign in words.items() if hasattr(part, name)]
    return f" {', '.join(dict.fromkeys(found))}" if found else ""


def _section(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _first_sentence(section: type[BaseModel]) -> str:
    text = " ".join((section.__doc__ or "").split("\n\n")[0].split())
    return text if section.__doc__ and not text.startswith(f"{section.__name__}(") else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(guarded(main))
