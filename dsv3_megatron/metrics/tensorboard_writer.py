"""TensorBoard event files in <run directory>/tensorboard, for those who look there."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_megatron.metrics.names import NAMES, grouped
from dsv3_megatron.metrics.step_metrics import StepMetrics
from parallel.errors import PackageError


class TensorBoardRun:
    """Writes scalars under the names that W&B gets, and histograms of expert load."""

    def __init__(self, directory: Path, first_step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter  # an optional package
        except ImportError:
            raise PackageError(
                "logging.tensorboard = true needs the tensorboard package; pip install -e '.[tensorboard]', or set it "
                "to false"
            ) from None
        # Steps that a resumed run will do again are dropped, as in metrics.jsonl.
        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step + 1)

    def write(self, metrics: StepMetrics) -> None:
        """Log one step."""
        for name, value in grouped(asdict(metrics)):
            self._writer.add_scalar(name, value, metrics.step)

    def loads(self, step: int, loads: np.ndarray) -> None:
        """Log for every MoE layer, of loads [L, E], the histogram of its experts' loads over their mean."""
        for layer, load in enumerate(loads):
            self._writer.add_histogram(f"moe/load/layer_{layer:02d}", load / max(load.mean(), 1e-9), step)

    def event(self, name: str, values: dict[str, Any]) -> None:
        """Log an evaluation."""
        for key, value in values.items():
            if key != "step" and key in NAMES:
                self._writer.add_scalar(NAMES[key], value, values.get("step"))

    def close(self) -> None:
        """Flush."""
        self._writer.close()
