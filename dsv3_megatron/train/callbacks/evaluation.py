"""The held-out loss: before the first step, every so many steps, and at the end."""

from __future__ import annotations

import math

from dsv3_megatron.data.source.build import Data
from dsv3_megatron.data.source.samples import evaluation_batches
from dsv3_megatron.train.step import evaluate_batches
from dsv3_megatron.train.trainer import Callback, CompletedStep, Trainer


class Evaluation(Callback):
    """Measures the held-out loss."""

    def __init__(self, data: Data, every_steps: int, *, is_first: bool):
        """``every_steps``: 0 = at the start and the end only."""
        self._data, self._every = data, every_steps
        self._bytes_per_token = data.bytes_per_token() if is_first else None

    def begin(self, trainer: Trainer) -> None:
        """Measure what the run begins with."""
        trainer.summary["before"] = self.evaluate(trainer)

    def after_step(self, trainer: Trainer, step: CompletedStep) -> None:
        """Measure when it is due; at the end of the run, :meth:`end` does."""
        if self._every and trainer.progress.step % self._every == 0 and not trainer.finished:
            self.evaluate(trainer)

    def end(self, trainer: Trainer) -> None:
        """Measure what the run has become; not in the minutes that a batch job has left when it is asked to stop."""
        if not trainer.stopped:
            trainer.summary["after"] = self.evaluate(trainer)

    def evaluate(self, trainer: Trainer) -> dict[str, float]:
        """Return the held-out loss, in nats per token, and on rank 0 bits per byte where the data is text."""
        batches = evaluation_batches(
            self._data.held_out,
            count=self._data.held_out_count,
            micro_batch=trainer.recipe.optim.micro_batch,
            dp_rank=trainer.parts.data_rank,
            dp=trainer.parts.layout.dp,
        )
        values = {"held_out_loss": evaluate_batches(trainer.parts, batches)}
        if self._bytes_per_token:
            values["bits_per_byte"] = values["held_out_loss"] / math.log(2) / self._bytes_per_token
        trainer.journal.evaluation(trainer.progress.step, values)
        return values
