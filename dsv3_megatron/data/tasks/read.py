"""Task files: JSON lines, an example a line, ``{"context": "...", "choices": ["...", ...], "answer": 0}``.

The text of a choice is the context and the choice, joined as they stand.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from dsv3_megatron.data.tasks.settings import EvaluateSettings
from dsv3_megatron.run.handed import parse_json, read_bytes
from dsv3_megatron.run.reasons import why_unread
from parallel.errors import DataError

_MOST_BYTES, _MOST_LINE = 1 << 28, 4 << 20  # of a file, and characters of a line of it


class Example(BaseModel):
    """A question: which of the choices goes on from the context?"""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    context: str
    choices: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    answer: NonNegativeInt
    id: str | int | None = None


@dataclass(frozen=True)
class Task:
    """A file of examples.

    Attributes:
        name: the file's, without its ending.
        lines: where each example stands in the file, from 1.
    """

    name: str
    path: str
    examples: tuple[Example, ...]
    lines: tuple[int, ...]

    @property
    def has_choices(self) -> bool:
        """Whether there is something to choose from; else the one continuation is to be the model's own."""
        return len(self.examples[0].choices) > 1


def read_task(path: str, most: int | None = None) -> Task:
    """Return the task of a file: its first ``most`` examples, or all. Every line is checked.

    Raises: DataError: it cannot be read, holds no example, or a line is none; names file, line and field.
    """
    examples, lines = [], []
    try:
        text = read_bytes(Path(path), _MOST_BYTES).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        why = "it is no UTF-8" if isinstance(error, UnicodeDecodeError) else why_unread(error)
        raise DataError(f"evaluate.tasks: {path} cannot be read ({why}); name a file of JSON lines") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            examples.append(_example(f"{path}:{number}", line))
            lines.append(number)
            if (len(examples[-1].choices) > 1) != (len(examples[0].choices) > 1):
                raise DataError(
                    f"{path}:{number}: choices has {len(examples[-1].choices)} entries, but {len(examples[0].choices)} "
                    f"in line {lines[0]}; keep examples of one choice in a task of their own"
                )
    if not examples:
        raise DataError(f"evaluate.tasks: {path} holds no example; write one a line, or leave the file out")
    return Task(Path(path).stem, path, tuple(examples[:most]), tuple(lines[:most]))


def check_tasks(settings: EvaluateSettings) -> None:
    """Read the tasks of a recipe, before anything is started or submitted. Raises: DataError: as :func:`read_task`."""
    for path in settings.tasks:
        read_task(path)


def _example(place: str, line: str) -> Example:
    if len(line) > _MOST_LINE:
        raise DataError(f"{place}: has {len(line):,} characters, and {_MOST_LINE:,} can be read; shorten it")
    try:
        example = Example.model_validate_json(line)
    except ValidationError as error:
        raise DataError(
            f"{place}: {_problem(error)}; an example is "
            '{"context": "...", "choices": ["...", ...], "answer": 0} and may have an "id"'
        ) from None
    try:
        parse_json(line, unique=True)
    except ValueError as error:
        raise DataError(f"{place}: {error}; write each key once") from None
    if example.answer >= len(example.choices):
        raise DataError(
            f"{place}: answer = {example.answer}, but there are {len(example.choices)} choices; count them from 0"
        )
    return example


def _problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    field, said = ".".join(map(str, first["loc"])), first["msg"]
    if first["type"] == "missing":
        return f"{field} is missing"
    if first["type"] == "extra_forbidden":
        return f"{field} is no field of an example"
    return f"{field}: {said[:1].lower()}{said[1:]}" if field else said
