"""Keeps report.html fresh while a run goes on, in a process of its own: training waits for no report but the last."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_megatron.metrics.step_metrics import StepMetrics
from dsv3_megatron.pipeline.schedule import schedule_of, stage_times
from dsv3_megatron.recipe import Recipe
from dsv3_megatron.run.directory import RunDirectory
from dsv3_megatron.run.reasons import reason_of
from dsv3_megatron.run.resilient import Outages
from parallel.errors import ScheduleError
from parallel.pipeline.drawing import draw_svg
from parallel.pipeline.simulator import simulate

# Of a long run a report takes seconds of a core that data may be read with: never more than this share of the time.
_LARGEST_SHARE = 0.02
_PATIENCE_SECONDS = 300.0  # for the last one: the other ranks wait for it
# A fresh interpreter finds the very modules of this one, in the same order.
_SAME_MODULES = {"PYTHONPATH": os.pathsep.join(os.path.abspath(place) for place in sys.path), "PYTHONSAFEPATH": "1"}


class ReportWriter:
    """Starts a process that writes the report whenever it is due and none is being written."""

    def __init__(self, directory: Path, every_seconds: float, outages: Outages):
        self._run, self._outages = RunDirectory(directory), outages
        self._every = every_seconds
        self._due = time.monotonic() + every_seconds
        self._process: subprocess.Popen[str] | None = None
        self._started = 0.0

    def write(self, metrics: StepMetrics) -> None:
        """Have the report written when it is due."""
        if self._process is not None and self._process.poll() is not None:
            self._finish()
        elif self._process is None and time.monotonic() >= self._due:
            self._start()

    def loads(self, step: int, loads: np.ndarray) -> None:
        """Nothing: the report reads them from their file."""

    def event(self, name: str, values: dict[str, Any]) -> None:
        """Nothing: the report reads them from their file."""

    def close(self) -> None:
        """Have the report written a last time, and wait for it."""
        if self._process is not None:
            self._process.kill()  # it would show less
            with suppress(subprocess.TimeoutExpired):
                self._process.communicate(timeout=_PATIENCE_SECONDS)
            self._process = None
        self._start(niceness=0)
        if self._process is not None:
            self._finish()

    def _start(self, niceness: int = 19) -> None:
        """Start a fresh interpreter, which shares neither GPU, connections nor signals with the run."""
        self._started = time.monotonic()
        try:
            self._process = self._open_process(niceness)
        except OSError as error:  # no memory for one more process, say
            self._outages.begin(str(self._run.report), reason_of(error))

    def _open_process(self, niceness: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "dsv3_megatron.report", str(self._run.path.resolve()), str(niceness)],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **_SAME_MODULES},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def _finish(self) -> None:
        """Take note of what became of the process, which has ended or soon will."""
        process, what = self._process, str(self._run.report)
        assert process is not None, "no report is being written"
        self._process = None
        try:
            _, said = process.communicate(timeout=_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            self._outages.begin(what, f"not written in {_PATIENCE_SECONDS:.0f} s")
        else:
            if process.returncode:
                lines = said.strip().splitlines() or [f"its process ended with {process.returncode}"]
                self._outages.begin(what, lines[-1])
            else:
                self._outages.end(what)
        took = time.monotonic() - self._started
        self._due = time.monotonic() + max(self._every, took / _LARGEST_SHARE)


def schedule_drawing(recipe: Recipe, microbatches: int) -> str | None:
    """Return the schedule of a step as SVG; None where one rank holds all stages."""
    if recipe.parallel.pipeline == 1:
        return None
    try:
        return draw_svg(simulate(schedule_of(recipe, microbatches), stage_times(recipe)))
    except ScheduleError:  # the batch ramp may begin below what the drawing's schedule needs
        return None
