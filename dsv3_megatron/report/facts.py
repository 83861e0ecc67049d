"""What the files of a run directory say, read without torch. Everything in the report comes from here."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dsv3_megatron.optim.regime import Regime
from dsv3_megatron.recipe import Recipe
from dsv3_megatron.report.thinning import Envelope, Point, Sample
from dsv3_megatron.run.directory import RunDirectory
from dsv3_megatron.run.files import iterate_json_lines, last_json_line, read_json

CURVES = (
    "lm_loss", "mtp_loss", "grad_norm", "max_violation", "max_violation_running", "tokens_per_second", "mfu",
    "tflops_per_device", "step_seconds", "memory_peak_bytes", "max_attention_logit", "clipped_heads",
)  # fmt: skip
MARKED = ("resumed", "skipped", "rolled_back", "save_failed")
_NEWEST = 200  # events that are listed, and marked in curves


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

    def add(self, step: dict[str, Any]) -> None:
        """Take the next step."""
        self.first = self.first or step
        self.last = step
        self.seconds += step["step_seconds"]
        if step["step"] in self._wanted:
            self.tokens_at[step["step"]] = step["tokens"]
        self._sample.add(step)
        for key, curve in self._curves.items():
            if (value := _number(step.get(key))) is not None:
                curve.add(step["tokens"], value)

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

    def add(self, event: dict[str, Any]) -> None:
        """Take the next event."""
        self.newest.append(event)
        self.latest = max(self.latest or event["time"], event["time"])
        if event["event"] == "started" and self.started is None:
            self.started = event["time"]
        if event["event"] == "held_out":
            self.held_out[event["step"]] = event["held_out_loss"]
            for key, loss in event.items():
                if key.startswith("held_out/"):
                    self.sources.setdefault(key.removeprefix("held_out/"), {})[event["step"]] = loss
        if event["event"] == "task":
            self.tasks.setdefault(event["task"], {})[event["step"]] = event["acc"]
        if event["event"] in MARKED and "step" in event:
            self.marked.append(event)

    @property
    def steps(self) -> set[int]:
        """Steps at which something happened that a curve shows."""
        measured = (self.held_out, *self.tasks.values())
        return {event["step"] for event in self.marked}.union(*measured)


@dataclass(frozen=True)
class RunFacts:
    """A run as its directory tells it."""

    recipe: Recipe
    recipe_text: str
    steps: Steps
    events: Events
    loads: dict[str, Any] | None
    environment: dict[str, Any]
    schedule_svg: str | None
    finished: bool

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
    """Return the facts of a run directory. Files that are not there yet leave their part empty.

    Every file is read once, a line at a time; of expert_load.jsonl only the end.
    Raises: FileNotFoundError: there is no recipe.yaml, so this is no run directory.
    """
    run = RunDirectory(path)
    text = run.recipe.read_text()
    events = Events()
    for event in iterate_json_lines(run.events):
        events.add(event)
    steps = Steps(events.steps)
    for step in iterate_json_lines(run.metrics):
        steps.add(step)
    return RunFacts(
        recipe=Recipe.model_validate(OmegaConf.to_container(OmegaConf.create(text))),
        recipe_text=text,
        steps=steps,
        events=events,
        loads=last_json_line(run.expert_load),
        environment=read_json(run.environment),
        schedule_svg=run.schedule.read_text() if run.schedule.exists() else None,
        finished=run.finished.exists(),
    )
