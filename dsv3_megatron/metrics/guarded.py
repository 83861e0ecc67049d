"""A writer over somebody else's package, whose failures end no run."""

from __future__ import annotations

from typing import Any

import numpy as np

from dsv3_megatron.metrics.step_metrics import MetricsWriter, StepMetrics
from dsv3_megatron.run.resilient import Outages


class Guarded:
    """Hands everything on. What the writer fails of is told once, counted until it works again, and else harmless."""

    def __init__(self, name: str, writer: MetricsWriter, outages: Outages):
        self._name, self._writer, self._outages = name, writer, outages

    def write(self, metrics: StepMetrics) -> None:
        """Keep one step."""
        self._outages.attempt(self._name, lambda: self._writer.write(metrics), Exception, lost=1)

    def loads(self, step: int, loads: np.ndarray) -> None:
        """Keep the tokens of every expert in a step, [MoE layers, E]."""
        self._outages.attempt(self._name, lambda: self._writer.loads(step, loads), Exception, lost=1)

    def event(self, name: str, values: dict[str, Any]) -> None:
        """Keep values that are no step."""
        self._outages.attempt(self._name, lambda: self._writer.event(name, values), Exception, lost=1)

    def close(self) -> None:
        """Flush what is kept."""
        self._outages.attempt(self._name, self._writer.close, Exception)
