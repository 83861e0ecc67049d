"""TensorBoard event files in <run directory>/tensorboard, for those who look there."""

from __future__ import annotations

import io
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_megatron.metrics.names import grouped, of_event
from dsv3_megatron.metrics.step_metrics import StepMetrics
from dsv3_megatron.run.resilient import ResilientFiles
from parallel.errors import PackageError


class TensorBoardRun:
    """Writes scalars under the names that W&B gets, and histograms of expert load.

    Records are appended through the run's own files and not by torch's SummaryWriter, whose thread dies of the first
    write that a disk refuses.
    """

    def __init__(self, directory: Path, first_step: int, files: ResilientFiles):
        try:
            from tensorboard.compat.proto import event_pb2  # an optional package
            from torch.utils.tensorboard import summary
        except ImportError:
            raise PackageError(
                "logging.tensorboard = true needs the tensorboard package; pip install -e '.[tensorboard]', or set it "
                "to false"
            ) from None
        self._proto, self._summary, self._files = event_pb2, summary, files
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._path = directory / "tensorboard" / name
        self._append([event_pb2.Event(file_version="brain.Event:2", wall_time=time.time())])
        # Steps that a resumed run will do again are dropped, as in metrics.jsonl.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._append([event_pb2.Event(session_log=start, step=first_step + 1, wall_time=time.time())])

    def write(self, metrics: StepMetrics) -> None:
        """Log one step."""
        self._add([self._summary.scalar(key, value) for key, value in grouped(asdict(metrics))], metrics.step)

    def loads(self, step: int, loads: np.ndarray) -> None:
        """Log for every MoE layer, of loads [L, E], the histogram of its experts' loads over their mean."""
        named = {f"moe/load/layer_{n:02d}": load / max(load.mean(), 1e-9) for n, load in enumerate(loads)}
        self._add([self._summary.histogram(name, load, bins="auto") for name, load in named.items()], step)

    def event(self, name: str, values: dict[str, Any]) -> None:
        """Log an evaluation."""
        scalars = [self._summary.scalar(key, value) for key, value in of_event(name, values).items()]
        self._add(scalars, values.get("step", 0))

    def close(self) -> None:
        """Nothing: every record is written at once."""

    def _add(self, summaries: list[Any], step: int) -> None:
        self._append([self._proto.Event(summary=s, step=step, wall_time=time.time()) for s in summaries])

    def _append(self, events: list[Any]) -> None:
        """Append events as records of the format that TensorBoard reads."""
        # an optional package
        from tensorboard.summary.writer.record_writer import RecordWriter

        records = io.BytesIO()
        writer = RecordWriter(records)
        for event in events:
            writer.write(event.SerializeToString())
        with suppress(OSError):  # without it nothing can be appended, which is told
            self._path.parent.mkdir(exist_ok=True)
        self._files.append(self._path, records.getvalue())
