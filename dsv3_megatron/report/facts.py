"""What the files of a run directory say, read without torch. Everything in the report comes from here."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from dsv3_megatron.optim.regime import Regime
from dsv3_megatron.recipe import Recipe
from dsv3_megatron.report.sound import is_drawing, shown_event, sound_event, sound_loads, sound_step
from dsv3_megatron.report.thinning import Envelope, Point, Sample
from dsv3_megatron.run.directory import RunDirectory
from dsv3_megatron.run.files import iterate_json_lines, last_json_line, read_json
from dsv3_megatron.run.handed import read_text
from dsv3_megatron.run.reasons import reason_of
from dsv3_megatron.run.recipe_text.secret_values import check_secrets
from dsv3_megatron.run.recipe_text.stored import read_stored_recipe
from dsv3_megatron.run.recipe_text.yaml_text import YAML_BYTES

CURVES = (
    "lm_loss", "mtp_loss", "grad_norm", "max_violation", "max_violation_running", "tokens_per_second", "mfu",
    "tflops_per_device", "step_seconds", "memory_peak_bytes", "max_attention_logit", "clipped_heads",
)  # fmt: skip
OTHERS = (
    "skipped", "memory_peak_rank", "bubble_fraction", "data_seconds", "pipeline_seconds", "update_seconds",
)  # fmt: skip
MARKED = ("resumed", "skipped", "rolled_back", "save_failed")
_NEWEST = 200  # events that are listed, and marked in curves
_SERIES = 200  # held-out sources, and tasks
_MEASURED = 50_000  # steps at which one of them was measured
_DRAWING_BYTES = 1 << 24


class Steps:
    """What the report says of the steps, taken from them one by one; its size does not grow with the run's.

    Attributes:
        first, last: the oldest and the newest step.
        seconds: of all steps together.
        sample: at most 300 steps with the same distance between them.
        tokens_at: tokens consumed after the steps that were asked for.
    """

    def __init__(self, wanted: set[int]):
        """``wanted``: steps whose tokens will be asked for."""
        self.first: dict[str, Any] | None = None
        self.last: dict[str, Any] | None = None
        self.seconds = 0.0
        self.tokens_at: dict[int, int] = {}
        self._wanted, self._sample = wanted, Sample(300)
        self._curves = {key: Envelope() for key in CURVES}

    def add(self, row: dict[str, Any]) -> bool:
        """Take the next step; return whether it is one (sound.py)."""
        if (step := sound_step(row, (*CURVES, *OTHERS))) is None:
            return False
        self.first = self.first or step
        self.last = step
        self.seconds += step["step_seconds"]
        if step["step"] in self._wanted:
            self.tokens_at[step["step"]] = step["tokens"]
        self._sample.add(step)
        for key, curve in self._curves.items():
            if (value := _number(step.get(key))) is not None:
                curve.add(step["tokens"], value)
        return True

    @property
    def sample(self) -> list[dict[str, Any]]:
        """Steps at equal distances, so that what is summed step by step can be drawn."""
        return self._sample.rows

    def curve(self, key: str) -> list[Point]:
        """Return a metric by tokens consumed, thinned (thinning.Envelope)."""
        return self._curves[key].points()


def _number(value: Any) -> float | None:
    """Return a metric as one number: of a list the largest, None where it has none."""
    return max((each for each in value if each is not None), default=None) if isinstance(value, list) else value


class Events:
    """What the report says of the events, taken from them one by one.

    Attributes:
        newest: the last of them, oldest first.
        marked: the last of those that a curve shows (``MARKED``).
        held_out: step -> held-out loss.
        sources: held-out source -> step -> loss.
        tasks: task -> step -> accuracy.
        started, latest: time of the first start and of the newest event, ISO 8601.
    """

    def __init__(self) -> None:
        self.newest: deque[dict[str, Any]] = deque(maxlen=_NEWEST)
        self.marked: deque[dict[str, Any]] = deque(maxlen=_NEWEST)
        self.held_out: dict[int, float] = {}
        self.sources: dict[str, dict[int, float]] = {}
        self.tasks: dict[str, dict[int, float]] = {}
        self.started: str | None = None
        self.latest: str | None = None

    def add(self, row: dict[str, Any]) -> bool:
        """Take the next event; return whether it is one (sound.py)."""
        if (event := sound_event(row)) is None:
            return False
        self.newest.append(shown_event(event))
        self.latest = max(self.latest or event["time"], event["time"])
        if event["event"] == "started" and self.started is None:
            self.started = event["time"]
        if event["event"] == "held_out":
            _measured(self.held_out, event["step"], event.get("held_out_loss"))
            for key, loss in event.items():
                if key.startswith("held_out/"):
                    _measured(_series(self.sources, key.removeprefix("held_out/")), event["step"], loss)
        if event["event"] == "task":
            _measured(_series(self.tasks, event["task"]), event["step"], event.get("acc"))
        if event["event"] in MARKED and event.get("step") is not None:
            self.marked.append({"event": event["event"], "step": event["step"]})
        return True

    @property
    def steps(self) -> set[int]:
        """Steps at which something happened that a curve shows."""
        measured = (self.held_out, *self.tasks.values())
        return {event["step"] for event in self.marked}.union(*measured)


def _series(all_of_them: dict[str, dict[int, float]], name: str) -> dict[int, float]:
    """Return what was measured under a name; of more names than can be drawn, nothing that is kept."""
    return all_of_them.setdefault(name, {}) if name in all_of_them or len(all_of_them) < _SERIES else {}


def _measured(values: dict[int, float], step: int, value: float | None) -> None:
    if value is not None and (step in values or len(values) < _MEASURED):
        values[step] = value


@dataclass(frozen=True)
class RunFacts:
    """A run as its directory tells it.

    ``left_out``: what of its files is not shown, one text each.
    """

    recipe: Recipe
    recipe_text: str
    steps: Steps
    events: Events
    loads: dict[str, Any] | None
    environment: dict[str, Any]
    schedule_svg: str | None
    finished: bool
    left_out: tuple[str, ...] = ()

    @property
    def last(self) -> dict[str, Any] | None:
        """The newest step."""
        return self.steps.last

    def curve(self, key: str) -> list[Point]:
        """Return a metric by tokens consumed, thinned."""
        return self.steps.curve(key)

    def by_tokens(self, values: dict[int, float]) -> list[Point]:
        """Return what was measured at steps by tokens consumed."""
        tokens = self.steps.tokens_at
        return [(float(tokens.get(n, 0)), value) for n, value in sorted(values.items()) if n in tokens or not n]

    @cached_property
    def regime(self) -> Regime:
        """What changes over the run."""
        return Regime(self.recipe.optim, self.recipe.data.sequence_length)

    @cached_property
    def budget_tokens(self) -> int:
        """Tokens of the whole run."""
        run = self.recipe.run
        by_steps = self.regime.tokens_of_step(run.steps) if run.steps is not None else None
        return min(t for t in (by_steps, run.tokens) if t is not None)

    @cached_property
    def effective_time(self) -> float | None:
        """Return seconds of steps that counted over seconds since the first start; None before there is one."""
        events, useful = self.events, self.steps.seconds
        if events.started is None or events.latest is None or self.last is None:
            return None
        wall = (datetime.fromisoformat(events.latest) - datetime.fromisoformat(events.started)).total_seconds()
        return min(1.0, useful / wall) if wall > useful * 0.5 else None


def read_run(path: Path) -> RunFacts:
    """Return the facts of a run directory. Files that are not there yet leave their part empty; rows that are no steps
    or events are counted.

    Every file is read once, a line at a time; of expert_load.jsonl only the end.
    Raises: FileNotFoundError: there is no recipe.yaml, so this is no run directory. ValueError: it holds none.
    """
    run, left_out = RunDirectory(path), _LeftOut()
    values, text = read_stored_recipe(run.recipe), read_text(run.recipe, YAML_BYTES)
    try:
        check_secrets(values)
    except (ValueError, AttributeError, TypeError) as error:  # of an older run; the types are judged below
        text = ""
        left_out.note(f"recipe.yaml ({reason_of(error)})")
    events = Events()
    left_out.read(run.events, events.add)
    steps = Steps(events.steps)
    left_out.read(run.metrics, steps.add)
    return RunFacts(
        recipe=Recipe.model_validate(values),
        recipe_text=text,
        steps=steps,
        events=events,
        loads=left_out.newest_loads(run.expert_load),
        environment=read_json(run.environment),
        schedule_svg=left_out.drawing(run.schedule),
        finished=run.finished.exists(),
        left_out=tuple(left_out.texts),
    )


class _LeftOut:
    """Reads files, and takes note of what is not sound."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._rows = 0

    def note(self, text: str) -> None:
        self.texts.append(text)

    def read(self, path: Path, add: Callable[[dict[str, Any]], bool]) -> None:
        self._rows = 0
        try:
            for row in iterate_json_lines(path, self._lose):
                if not add(row):
                    self._lose()
        except OSError as error:
            self.note(f"{path.name} ({reason_of(error)})")
        if self._rows:
            self.note(f"{self._rows:,} row{'s' * (self._rows > 1)} of {path.name}")

    def newest_loads(self, path: Path) -> dict[str, Any] | None:
        try:
            newest = last_json_line(path)
        except OSError as error:
            self.note(f"{path.name} ({reason_of(error)})")
            return None
        loads = sound_loads(newest)
        if newest is not None and loads is None:
            self.note(f"the newest row of {path.name}")
        return loads

    def drawing(self, path: Path) -> str | None:
        if not path.exists():
            return None
        try:
            text = read_text(path, _DRAWING_BYTES)
            if is_drawing(text):
                return text
            self.note(f"{path.name} (no drawing of a schedule)")
        except (OSError, ValueError) as error:
            self.note(f"{path.name} ({reason_of(error)})")
        return None

    def _lose(self) -> None:
        self._rows += 1
