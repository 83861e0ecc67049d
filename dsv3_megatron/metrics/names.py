"""Names of the metrics where they are looked at in groups: W&B, TensorBoard, dashboards. metrics.jsonl keeps the plain
keys."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

GROUPS: dict[str, tuple[str, ...]] = {
    "train": (
        "step", "tokens", "samples", "loss", "lm_loss", "learning_rate", "grad_norm", "global_batch", "skipped",
        "excluded_tokens",
    ),
    "mtp": ("mtp_loss",),
    "moe": (
        "balance_loss", "max_violation", "max_violation_running", "layer_violation", "rerouted_choices",
        "dropped_choices",
    ),
    "attention": ("max_attention_logit", "clipped_heads"),
    "pipeline": ("bubble_fraction", "slowest_rank", "slowest_ratio"),
    "speed": (
        "step_seconds", "data_seconds", "pipeline_seconds", "update_seconds", "tokens_per_second", "tflops_per_device",
        "mfu",
    ),
    "memory": ("memory_peak_bytes", "memory_peak_rank"),
    "evaluation": ("held_out_loss", "bits_per_byte"),
}  # fmt: skip
FAMILIES = ("held_out", "bits_per_byte", "tasks")  # of names that a run's sources and tasks end: held_out/web
TASK = ("acc", "acc_norm", "acc_bytes", "perplexity")  # what is measured of a task
NAMES = {key: f"{group}/{key.removeprefix(group + '_')}" for group, keys in GROUPS.items() for key in keys}


def of_event(event: str, values: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of an event by name. Those of a held-out source bring its name along (``held_out/web``), those
    of a task get it here (``tasks/hellaswag/acc``)."""
    if event == "task":
        return {f"tasks/{values['task']}/{key}": values[key] for key in TASK if key in values}
    return {NAMES.get(key, key): value for key, value in values.items() if key in GROUPS["evaluation"] or "/" in key}


def grouped(values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield (name, number) of every metric that has one; a list gets a name for each of its entries."""
    for key, value in values.items():
        if isinstance(value, (list, tuple)):
            yield from ((f"{NAMES[key]}/{n:02d}", float(v)) for n, v in enumerate(value) if math.isfinite(v))
        elif value is not None and math.isfinite(value):
            yield NAMES[key], value
