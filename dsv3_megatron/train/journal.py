"""What a run tells a person and writes down, on rank 0; on every other rank it does nothing."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np

from dsv3_megatron.data.exclude import Exclusion
from dsv3_megatron.data.identity import DataIdentity
from dsv3_megatron.data.tasks.results import TaskResult
from dsv3_megatron.data.tokenizer import Tokenizer
from dsv3_megatron.metrics.step_metrics import JsonLines, MetricsWriter, StepMetrics, append_event
from dsv3_megatron.pipeline.parts import Parts
from dsv3_megatron.run.directory import RunDirectory, environment
from dsv3_megatron.run.resilient import ResilientFiles
from dsv3_megatron.train.facts import run_facts
from dsv3_megatron.train.progress import Progress
from dsv3_megatron.train.writers import open_writers


class Reporter(Protocol):
    """Who tells a person what happens. Called on rank 0 only."""

    def start(self, facts: dict[str, str]) -> None:
        """The run is built and about to train."""

    def step(self, metrics: StepMetrics, last_step: int | None) -> None:
        """A step is done."""

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """The held-out loss was measured."""

    def note(self, text: str) -> None:
        """Something a person should know: resumed, saved, skipped."""


class Journal:
    """The console, events.jsonl, metrics.jsonl and the writers beside it, as one."""

    def __init__(self, directory: RunDirectory, reporter: Reporter, *, speaks: bool):
        """``speaks``: whether this is rank 0."""
        self.directory, self.speaks = directory, speaks
        self._reporter = reporter
        self._writers: list[MetricsWriter] = []
        self.files = ResilientFiles(self.event)

    def open(
        self,
        parts: Parts,
        progress: Progress,
        resolved_recipe: str,
        *,
        finished: bool,
        text: DataIdentity | None = None,
    ) -> None:
        """Write what the run starts with, and open the writers.

        Args:
            finished: no step is left to do.
            text: which one is read; None where samples are made from a seed.
        """
        if not self.speaks:
            return
        layout, files = parts.layout, self.files
        world = {"size": layout.world_size, "layout": asdict(layout)}
        files.replace(self.directory.recipe, resolved_recipe)
        files.replace(self.directory.environment, json.dumps(environment(world), indent=2) + "\n")
        self._lines = JsonLines(self.directory, files, progress.step)
        if not finished:
            gone = self.directory.finished
            files.outages.attempt(str(gone), lambda: gone.unlink(missing_ok=True))
        append_event(files, self.directory, "started", {} if text is None else {"data": text.described()})
        self._writers = [
            self._lines,
            *open_writers(parts.recipe, layout, progress.step, progress.tokens, files, self._reporter.note),
        ]
        self._reporter.start(run_facts(parts))

    def keep_tokenizer(self, tokenizer: Tokenizer | None) -> None:
        """Keep the tokenizer of the text beside the recipe, for whoever generates from the run or exports it."""
        if self.speaks and tokenizer is not None:
            for name, text in tokenizer.files().items():
                self.files.replace(self.directory.path / name, text)

    def keep_exclusion(self, exclusion: Exclusion) -> None:
        """Keep what is left out, whatever becomes of the file that said so."""
        if self.speaks and exclusion.sha256 is not None:
            self.files.replace(self.directory.excluded(exclusion.sha256), exclusion.text)

    def note(self, text: str) -> None:
        """Tell a person."""
        if self.speaks:
            self._reporter.note(text)

    def event(self, name: str, values: dict[str, Any], text: str) -> None:
        """Tell a person, and keep it in events.jsonl."""
        if self.speaks:
            self._reporter.note(text)
            append_event(self.files, self.directory, name, values)

    def step(self, metrics: StepMetrics, last_step: int | None) -> None:
        """Keep a step's metrics."""
        self.files.retry()
        for writer in self._writers:
            writer.write(metrics)
        if self.speaks:
            self._reporter.step(metrics, last_step)

    def loads(self, step: int, loads: np.ndarray) -> None:
        """Keep the tokens of every expert in a step, [MoE layers, E]."""
        for writer in self._writers:
            writer.loads(step, loads)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Keep a held-out loss."""
        for writer in self._writers:
            writer.event("held_out", {**values, "step": step})
        if self.speaks:
            self._reporter.evaluation(step, values)

    def task(self, step: int, result: TaskResult) -> None:
        """Keep what was achieved in a task."""
        for writer in self._writers:
            writer.event("task", {"step": step, **result.values()})
        self.note(f"step {step}: {result.line()}")

    def rewind(self, step: int) -> None:
        """Drop the steps after ``step`` from metrics.jsonl: the run does them again."""
        if self.speaks:
            self._lines.rewind(step)

    def close(self, summary: dict[str, Any], *, finished: bool) -> None:
        """Write the summary, unless an earlier start's says more, and close the writers."""
        if not self.speaks:
            return
        if summary["before"] or not self.directory.summary.exists():
            self.files.replace(self.directory.summary, json.dumps(summary, indent=2) + "\n")
        if finished:
            self.files.replace(self.directory.finished, "")
        for writer in self._writers:
            writer.close()
        self.files.close()
