"""Which samples a step of a run has read, or will read: from the run's files alone, without data or a model.

A run is a row of starts, each from the step that it resumed from. A step belongs to the last start that came so far,
which may have had another recipe than the last one of all, and may have left out other documents.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsv3_megatron.data.exclude import Exclusion, read_exclusion
from dsv3_megatron.data.source.samples import MOST_SAMPLES, numbers_before, sample_numbers
from dsv3_megatron.optim.regime import Regime
from dsv3_megatron.recipe import Recipe
from dsv3_megatron.run.directory import RunDirectory
from dsv3_megatron.run.files import iterate_json_lines
from dsv3_megatron.train.progress import Progress
from parallel.errors import RecipeError
from parallel.units import show_count

_Count = Annotated[int, Field(ge=0, lt=MOST_SAMPLES)]
_MOST_SEQUENCES = 1 << 24  # of a step that is listed
_EVENT = "it gives what no such event does"


_T = TypeVar("_T", bound=BaseModel)


class _Typed(BaseModel):
    """What is read of a line, which may be of somebody else's making; what it says besides is left alone."""

    model_config = ConfigDict(strict=True, extra="ignore")


class Row(_Typed):
    """A line of metrics.jsonl."""

    step: _Count
    tokens: Annotated[int, Field(ge=0, lt=1 << 62)]
    global_batch: Annotated[int, Field(gt=0, le=_MOST_SEQUENCES)]
    samples: _Count | None = None  # an older version did not write it


class _Text(_Typed):
    sha256: str
    name: str
    order: int


class _Event(_Typed):
    """A line of events.jsonl: what its kind says is judged once that is known."""

    event: str


class _Resumed(_Typed):
    step: _Count


class _RecipeChanged(_Typed):
    changes: dict[str, Annotated[list[Any], Field(min_length=2, max_length=2)]]


class _Started(_Typed):
    data: _Text | None = None


class _Excluded(_Typed):
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


_EVENTS: dict[str, type[_Typed]] = {
    "resumed": _Resumed,
    "recipe_changed": _RecipeChanged,
    "started": _Started,
    "excluded": _Excluded,
}


@dataclass(frozen=True)
class StepRead:
    """What a step has read, or will read.

    Attributes:
        step: its number, from 1; None for a sample that no step has read, which is counted by the recipe as it is now.
        recipe: that the step was done with.
        exclusion: what was left out in it.
        numbers: of its samples, in their order.
        notes: what a person should know, in a line each.
        text: which one was read, as data/identity.py describes it; None where that is not known.
    """

    step: int | None
    recipe: Recipe
    exclusion: Exclusion
    numbers: Sequence[int]
    notes: tuple[str, ...] = ()
    text: dict[str, Any] | None = None


@dataclass
class _Start:
    """A start of a run: from which step, what its recipe changed (key -> then, now), the digest of what it leaves out,
    and which text it reads."""

    step: int = 0
    changes: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    excluded: str | None = None
    text: dict[str, Any] | None = None


class History:
    """A run as its directory tells it."""

    def __init__(self, run: RunDirectory, recipe: Recipe):
        """``recipe``: of the run directory, with which it was started last."""
        self._run, self._recipe = run, recipe
        self._starts = _starts(run)

    def step(self, step: int) -> StepRead:
        """Return what step ``step`` (from 1) has read; of one that is not done yet, what it will read."""
        row, last = self._find(lambda row: row.step >= step)
        if row is not None and row.step == step:
            return self._done(row)
        if row is not None:
            raise RecipeError(f"step = {step} is not in {self._run.metrics}, but step {row.step} is; restore the file")
        return self._to_come(last, step=step)

    def tokens(self, tokens: int) -> StepRead:
        """Return what the step has read that began at so many tokens or before, and ended after them."""
        row, last = self._find(lambda row: row.tokens > tokens)
        if row is not None:
            return self._done(row)
        return self._to_come(last, tokens=tokens)

    def sample(self, number: int) -> StepRead:
        """Return the step that has read sample ``number``, with that sample alone."""
        row, last = self._find(lambda row: self._samples_after(row) > number)
        if row is None:
            recipe, exclusion = self._at(self._last)
            note = "" if last is None else f": {self._run.metrics} ends with step {last.step}"
            notes = (f"no step has read sample {number:,} yet{note}",)
            return StepRead(None, recipe, exclusion, [number], notes, self._last.text)
        found = self._done(row)
        if number in found.numbers:
            return replace(found, numbers=[number])
        note = f"sample {number:,} was stepped over: excluded, or left behind by a roll-back, before step {row.step}"
        return replace(found, step=None, numbers=[number], notes=(*found.notes, note))

    def _find(self, wanted: Callable[[Row], bool]) -> tuple[Row | None, Row | None]:
        """Return the first row that is wanted (None: no row is), and the last row that was looked at."""
        row = None
        for line in _lines(self._run.metrics):
            row = _typed(Row, line, self._run.metrics, "it is no step")
            if wanted(row):
                return row, row
        return None, row

    def _done(self, row: Row) -> StepRead:
        start = self._start_of(row.step)
        recipe, exclusion = self._at(start)
        numbers = numbers_before(self._samples_after(row), row.global_batch, exclusion.samples)
        return StepRead(row.step, recipe, exclusion, numbers, self._notes_of(row), start.text)

    def _to_come(self, last: Row | None, step: int | None = None, tokens: int | None = None) -> StepRead:
        """Return what a later step will read, going on from the last one that is done."""
        recipe, exclusion = self._at(self._last)
        at = Progress() if last is None else Progress(last.step, last.tokens, self._samples_after(last))
        done, notes = at.step, () if last is None else self._notes_of(last)
        found = foreseen(recipe, exclusion, at, step, tokens)
        note = f"{done:,} steps are done: this is what step {found.step:,} will read if none is rolled back"
        return replace(found, notes=(*notes, note), text=self._last.text)

    @property
    def _last(self) -> _Start:
        return self._starts[-1] if self._starts else _Start()

    def _samples_after(self, row: Row) -> int:
        """Return the number from which on the step after a row reads."""
        return row.tokens // self._recipe.data.sequence_length if row.samples is None else row.samples

    def _notes_of(self, row: Row) -> tuple[str, ...]:
        if row.samples is not None:
            return ()
        return (
            f"{self._run.metrics} does not say which samples were read (an older version wrote it): this is right if "
            "the run has rolled nothing back",
        )

    def _start_of(self, step: int) -> _Start:
        return self._starts[self._index_of(step, len(self._starts))] if self._starts else _Start()

    def _index_of(self, step: int, before: int) -> int:
        """Return the last of the first ``before`` starts that has done ``step``."""
        return next((i for i in range(before - 1, -1, -1) if self._starts[i].step < step), 0)

    def _at(self, wanted: _Start) -> tuple[Recipe, Exclusion]:
        """Return recipe and exclusion of a start."""
        values = self._recipe.model_dump(mode="json")
        index = len(self._starts) - 1
        while self._starts and self._starts[index] is not wanted and index:
            for key, (then, _) in self._starts[index].changes.items():
                _set(values, key, then)
            index = self._index_of(self._starts[index].step, index)  # that has written the checkpoint it came from
        excluded = wanted.excluded
        exclusion = Exclusion() if excluded is None else read_exclusion(self._run.excluded(excluded))
        values["data"]["exclude"] = exclusion.path or None
        try:
            return Recipe.model_validate(values), exclusion
        except ValidationError:
            raise RecipeError(f"{self._run.events} says of a recipe what none can; restore the file") from None


def foreseen(
    recipe: Recipe, exclusion: Exclusion, at: Progress, step: int | None = None, tokens: int | None = None
) -> StepRead:
    """Return what a step after ``at`` will read if none is rolled back: step ``step``, or the first that ends after
    more than ``tokens`` tokens.

    Raises: RecipeError: the run ends before.
    """
    run, length = recipe.run, recipe.data.sequence_length
    regime = Regime(recipe.optim, length)
    at = replace(at)
    while (run.steps is None or at.step < run.steps) and (run.tokens is None or at.tokens < run.tokens):
        numbers, after = sample_numbers(at.samples, regime.global_batch(at.tokens), exclusion.samples)
        at.step, at.samples, at.tokens = at.step + 1, after, at.tokens + len(numbers) * length
        if at.step == step or (tokens is not None and at.tokens > tokens):
            return StepRead(at.step, recipe, exclusion, numbers)
    raise RecipeError(
        f"the run ends with step {at.step:,}, after {show_count(at.tokens)} tokens (run.steps, run.tokens); name an "
        "earlier step"
    )


def _starts(run: RunDirectory) -> list[_Start]:
    """Return the starts of a run that got as far as training, oldest first."""
    found: list[_Start] = []
    coming = _Start()
    for line in _lines(run.events):
        name = _typed(_Event, line, run.events, "it has no name").event
        if name not in _EVENTS:
            continue
        event = _typed(_EVENTS[name], line, run.events, _EVENT)
        if isinstance(event, _Resumed):
            coming = _Start(event.step)
        elif isinstance(event, _RecipeChanged):
            coming.changes = {key: (then, now) for key, (then, now) in event.changes.items()}
        elif isinstance(event, _Started):
            coming.text = None if event.data is None else event.data.model_dump()
            found.append(coming)
            coming = _Start()
        elif isinstance(event, _Excluded) and found:
            found[-1].excluded = event.sha256
    return found


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        yield from iterate_json_lines(path)
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror}); restore the file") from None


def _typed(model: type[_T], line: dict[str, Any], path: Path, why: str) -> _T:
    try:
        return model.model_validate(line)
    except ValidationError:
        said = json.dumps(line)
        raise RecipeError(f"{path} cannot be understood ({why}: {said[:80]}); restore the file") from None


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of nested sections; one that is no key any more has no effect, and is left alone."""
    *sections, name = key.split(".")
    for section in sections:
        inner = values.get(section)
        values = inner if isinstance(inner, dict) else {}
    if name in values:
        values[name] = deepcopy(value)
