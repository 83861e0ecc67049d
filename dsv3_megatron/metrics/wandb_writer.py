"""Weights & Biases: offline unless asked otherwise, one run over all starts of a run directory."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_megatron.metrics.names import NAMES, grouped, of_event
from dsv3_megatron.metrics.row_numbers import RowNumbers
from dsv3_megatron.metrics.step_metrics import StepMetrics
from dsv3_megatron.model.costs import count_parameters
from dsv3_megatron.recipe import Recipe
from dsv3_megatron.run.directory import RunDirectory
from dsv3_megatron.run.handed import read_text
from dsv3_megatron.run.reasons import first_line
from dsv3_megatron.run.resilient import ResilientFiles
from dsv3_megatron.run.shell import program
from parallel.errors import PackageError

_PATIENCE_SECONDS = 30  # at the start, for a server that does not answer
_LOAD_BINS = np.linspace(0.0, 4.0, 33)  # of an expert's load over the mean; what is above goes into the last


class WandbRun:
    """Logs under grouped names (train/, moe/, ...), over tokens. metrics.jsonl stays the truth: whatever happens to
    W&B, the run goes on. Every row says its training step and tokens; one that is done again is a row more."""

    def __init__(
        self, recipe: Recipe, first_step: int, tokens: int, files: ResilientFiles, tell: Callable[[str], None]
    ):
        if recipe.logging.wandb == "offline":  # the library reports errors and times to its makers, offline too (0.31)
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            import wandb  # a second to import, and may be off
        except ImportError:
            raise PackageError(
                "logging.wandb needs the wandb package; pip install wandb, or set logging.wandb=disabled"
            ) from None
        self._wandb, self._directory, self._name = wandb, RunDirectory(recipe.run.directory), recipe.run.name
        logging, counted = recipe.logging, count_parameters(recipe.model)
        options: dict[str, Any] = {
            "id": run_id(self._directory.path, files),
            "resume": "allow",  # a requeued job goes on with the same curves
            "project": logging.wandb_project,
            "name": recipe.run.name,
            "group": logging.wandb_group or recipe.recipe,
            "job_type": "pretrain",
            "config": {
                **recipe.model_dump(mode="json"),
                "parameters": {"trained": counted.trained, "frozen": counted.frozen},
            },
            "dir": str(self._directory.path),
            "settings": wandb.Settings(
                silent=True, console="off", x_disable_stats=True, init_timeout=_PATIENCE_SECONDS
            ),
        }
        try:
            self._run = wandb.init(mode=logging.wandb, **options)
        except wandb.errors.Error as error:
            if logging.wandb != "online":
                raise PackageError(
                    f"logging.wandb = {logging.wandb} failed ({first_line(error)}); set logging.wandb=disabled"
                ) from None
            tell(
                f"warning: logging.wandb = online failed ({first_line(error)}); this start is kept offline, "
                f"`{program('wandb')} sync {self._directory.path}/wandb/offline-run-*` uploads it"
            )
            wandb.teardown()  # its service holds the id of the start that failed
            self._run = wandb.init(mode="offline", **options)
        self._run.define_metric("*", step_metric=NAMES["tokens"])
        self._rows = RowNumbers(self._directory.path / "wandb_rows", files)
        self._place: dict[str, float] = {NAMES["step"]: first_step, NAMES["tokens"]: tokens}

    def write(self, metrics: StepMetrics) -> None:
        """Log one step."""
        values = dict(grouped(asdict(metrics)))
        self._place = {name: values[name] for name in self._place}
        self._log(values)

    def _log(self, values: dict[str, Any]) -> None:
        """Log a row at the place in the run where the last step has led."""
        self._run.log({**self._place, **values}, step=self._rows.take(), commit=True)

    def loads(self, step: int, loads: np.ndarray) -> None:
        """Log for every MoE layer, of loads [L, E], a histogram of its experts' loads over their mean."""
        values = {}
        for layer, load in enumerate(loads):
            relative = np.minimum(load / max(load.mean(), 1e-9), _LOAD_BINS[-1])
            histogram = self._wandb.Histogram(np_histogram=np.histogram(relative, bins=_LOAD_BINS))
            values[f"moe/load/layer_{layer:02d}"] = histogram
        self._log(values)

    def event(self, name: str, values: dict[str, Any]) -> None:
        """Log an evaluation; its newest values are in the summary too."""
        numbers = of_event(name, values)
        self._log(numbers)
        self._run.summary.update(numbers)

    def close(self) -> None:
        """Add report and schedule as an artifact, and end the run."""
        try:
            artifact = self._wandb.Artifact(re.sub(r"[^A-Za-z0-9._-]+", "_", self._name) + "-report", type="report")
            for path in (self._directory.report, self._directory.schedule, self._directory.recipe):
                if path.exists():
                    artifact.add_file(str(path))
            self._run.log_artifact(artifact)
        finally:
            self._run.finish()


def run_id(directory: Path, files: ResilientFiles) -> str:
    """Return the run's W&B id: made once, kept in the run directory, the same after every requeue."""
    path = directory / "wandb_id"
    try:
        made = read_text(path, 1000).strip() if path.exists() else ""
    except (OSError, ValueError):
        made = ""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", made):  # it becomes the name of a folder
        made = secrets.token_hex(4)
        files.replace(path, made + "\n")
    return made
