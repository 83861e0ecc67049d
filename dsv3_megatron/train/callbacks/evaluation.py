"""The held-out loss, of every source and of all: before the first step, every so many steps, and at the end."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from dsv3_megatron.data.source.build import Data
from dsv3_megatron.data.source.held_out import HeldOut
from dsv3_megatron.pipeline.parts import Parts
from dsv3_megatron.train.evaluation.scoring import Scores, score
from dsv3_megatron.train.trainer import Callback, CompletedStep, Trainer


class Evaluation(Callback):
    """Measures the held-out loss."""

    def __init__(self, data: Data, every_steps: int, *, is_first: bool):
        """``every_steps``: 0 = at the start and the end only."""
        self._held_out, self._every = data.held_out, every_steps
        self._bytes = data.held_out_bytes() if is_first else None

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
        """Return the held-out losses (``losses``), bits per byte on rank 0 alone."""
        values = losses(trainer.parts, self._held_out, self._bytes)
        trainer.journal.evaluation(trainer.progress.step, values)
        return values


def losses(parts: Parts, held_out: HeldOut, text_bytes: np.ndarray | None) -> dict[str, float]:
    """Return ``held_out_loss``, in nats per token of all that is evaluated, and ``held_out/SOURCE`` of each source;
    where the data is text, also ``bits_per_byte`` and ``bits_per_byte/SOURCE``.

    Args:
        text_bytes: [count] that each sequence predicts (``Data.held_out_bytes``); None = no text.
    """
    scores = score(parts, held_out, held_out.count, parts.recipe.optim.micro_batch)
    return dict(_losses(scores, held_out, text_bytes))


def _losses(scores: Scores, held_out: HeldOut, text_bytes: np.ndarray | None) -> Iterator[tuple[str, float]]:
    whole = ("held_out_loss", "bits_per_byte", range(held_out.count))
    each = ((f"held_out/{name}", f"bits_per_byte/{name}", numbers) for name, numbers in held_out.ranges.items())
    for loss_key, bits_key, numbers in (whole, *each):
        chosen = slice(numbers.start, numbers.stop)
        yield loss_key, scores[chosen].loss
        if text_bytes is not None:
            yield bits_key, float(-scores[chosen].log_likelihoods.sum() / math.log(2) / text_bytes[chosen].sum())
