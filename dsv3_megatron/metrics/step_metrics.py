"""What a step reports, and metrics.jsonl, where it is always written. Other writers: train/writers.py."""

from __future__ import annotations

import json
import math
import resource
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import numpy as np
import torch

from dsv3_megatron.run.directory import RunDirectory
from dsv3_megatron.run.resilient import ResilientFiles


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl. Losses are means over the tokens of the whole global batch, in nats.

    ``samples`` is the number of the first sample that the next step reads: it runs ahead of ``tokens`` by what a
    roll-back or an exclusion has stepped over. ``excluded_tokens`` are the places of this step's sequences that
    documents left out by name would fill (null where none are).

    ``loss`` is the training objective (lm + weighted MTP + weighted balance), ``mtp_loss`` the unweighted mean over
    MTP depths, ``balance_loss`` the weighted sum over layers. ``bubble_fraction`` is the measured share of the step
    that ranks waited for their pipeline neighbours, mean over ranks; ``mfu`` is null where the device's peak is not in
    the cluster file. ``max_violation`` is MaxVio of the batch, mean over layers; ``max_violation_running`` that of the
    loads averaged over about a hundred steps; ``layer_violation`` the batch's by MoE layer, MTP modules last.
    ``rerouted_choices`` and ``dropped_choices`` count token-expert choices for which an expert had no room (null
    where experts have no capacity). ``max_attention_logit`` is the largest of each layer, MTP modules last
    (null for one that is no finite number), and ``clipped_heads`` how many heads of the model QK-clip has scaled down
    after this step (both null without optim.qk_clip). ``skipped`` counts steps skipped so far. ``slowest_rank`` took
    ``slowest_ratio`` times the median rank's seconds for the same work when last compared. ``data_seconds`` is how long
    the rank that waited longest for its samples has waited, next to nothing where reading ahead keeps up.
    ``memory_peak_bytes`` is the most that ``memory_peak_rank`` has held since it started, of all ranks the largest
    (null where one rank is all there is).
    """

    step: int
    tokens: int
    samples: int
    loss: float
    lm_loss: float
    mtp_loss: float | None
    balance_loss: float
    learning_rate: float
    grad_norm: float
    global_batch: int
    step_seconds: float
    tokens_per_second: float
    tflops_per_device: float
    mfu: float | None
    bubble_fraction: float | None
    memory_peak_bytes: int
    max_violation: float | None
    max_violation_running: float | None
    layer_violation: list[float] | None
    rerouted_choices: int | None
    dropped_choices: int | None
    skipped: int
    memory_peak_rank: int | None = None
    data_seconds: float | None = None
    pipeline_seconds: float | None = None
    update_seconds: float | None = None
    slowest_rank: int | None = None
    slowest_ratio: float | None = None
    excluded_tokens: int | None = None
    max_attention_logit: list[float] | None = None
    clipped_heads: int | None = None


def peak_memory_bytes(device: torch.device) -> int:
    """Return the largest memory this process has held: on the GPU where there is one, else resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB on Linux, in bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


class MetricsWriter(Protocol):
    """Something that keeps metrics."""

    def write(self, metrics: StepMetrics) -> None:
        """Keep one step."""

    def loads(self, step: int, loads: np.ndarray) -> None:
        """Keep the tokens of every expert in a step, [MoE layers, E]; asked for every so many steps."""

    def event(self, name: str, values: dict[str, Any]) -> None:
        """Keep values that are no step: an evaluation, the summary."""

    def close(self) -> None:
        """Flush what is kept."""


class JsonLines:
    """metrics.jsonl, an object a step; expert_load.jsonl; the evaluations in events.jsonl. Always written."""

    def __init__(self, directory: RunDirectory, files: ResilientFiles, last_step: int):
        """Steps after ``last_step``, which a resumed run will do again, are dropped from metrics.jsonl."""
        self._directory, self._files = directory, files
        self.rewind(last_step)

    def rewind(self, last_step: int) -> None:
        """Drop the steps after ``last_step``: they are done again."""
        self._files.cut(self._directory.metrics, lambda row: _is_step(row, last_step))

    def write(self, metrics: StepMetrics) -> None:
        """Append one step."""
        self._files.append(self._directory.metrics, json_line(asdict(metrics)))

    def loads(self, step: int, loads: np.ndarray) -> None:
        """Append the tokens of every expert, [MoE layers, E]."""
        line = {"step": step, "loads": [[int(n) for n in row] for row in loads]}
        self._files.append(self._directory.expert_load, json_line(line))

    def event(self, name: str, values: dict[str, Any]) -> None:
        """Append an evaluation to events.jsonl."""
        append_event(self._files, self._directory, name, values)

    def close(self) -> None:
        """Write what had to wait; every other line was written at once."""
        self._files.flush()


def _is_step(row: dict[str, Any], last: int) -> bool:
    """Return whether a row is a step up to ``last``: what is none is dropped with those that are done again."""
    return isinstance(row.get("step"), int) and row["step"] <= last


def append_event(files: ResilientFiles, directory: RunDirectory, name: str, values: dict[str, Any]) -> None:
    """Append an event to events.jsonl, with the time."""
    line = {"event": name, "time": datetime.now(UTC).isoformat(timespec="seconds"), **values}
    files.append(directory.events, json_line(line))


def json_line(values: dict[str, Any]) -> bytes:
    """Return an object as a line. NaN and infinity become null: they are not JSON."""
    return json.dumps({k: _json_number(v) for k, v in values.items()}).encode() + b"\n"


def _json_number(value: Any) -> Any:
    if isinstance(value, list):
        return [_json_number(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
