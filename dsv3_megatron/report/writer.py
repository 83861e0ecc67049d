"""Keeps report.html fresh while a run goes on, at a rate that costs it nothing."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_megatron.metrics.step_metrics import StepMetrics, append_event
from dsv3_megatron.pipeline.schedule import schedule_of, stage_times
from dsv3_megatron.recipe import Recipe
from dsv3_megatron.report.page import write_report
from dsv3_megatron.run.directory import RunDirectory
from parallel.errors import ScheduleError
from parallel.pipeline.drawing import draw_svg
from parallel.pipeline.simulator import simulate

# A report takes a moment to write: of a long run, seconds. Never more than this share of the run.
_LARGEST_SHARE = 0.002


class ReportWriter:
    """Writes what the report needs and metrics.jsonl does not hold, and the report itself."""

    def __init__(self, directory: Path, every_seconds: float):
        self._run = RunDirectory(directory)
        self._every = every_seconds
        self._due = time.monotonic() + every_seconds
        append_event(self._run.events, "started", {})

    def write(self, metrics: StepMetrics) -> None:
        """Write the report when it is due."""
        if time.monotonic() >= self._due:
            self._write_report()

    def loads(self, step: int, loads: np.ndarray) -> None:
        """Append the tokens of every expert, [L, E]."""
        line = {"step": step, "loads": [[int(n) for n in row] for row in loads]}
        with suppress(OSError), self._run.expert_load.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def event(self, name: str, values: dict[str, Any]) -> None:
        """Keep an evaluation among the events."""
        append_event(self._run.events, name, values)

    def close(self) -> None:
        """Write the report a last time."""
        self._write_report()

    def _write_report(self) -> None:
        start = time.monotonic()
        with suppress(OSError):  # a full disk is told by the checkpoints; a missing report stops no run
            write_report(self._run.path)
        took = time.monotonic() - start
        self._due = time.monotonic() + max(self._every, took / _LARGEST_SHARE)


def draw_schedule(recipe: Recipe, microbatches: int, path: Path) -> None:
    """Write the schedule of a step as schedule.svg; nothing where one rank holds all stages."""
    if recipe.parallel.pipeline == 1:
        return
    with suppress(ScheduleError, OSError):  # the batch ramp may begin below what the drawing's schedule needs
        path.write_text(draw_svg(simulate(schedule_of(recipe, microbatches), stage_times(recipe))))
