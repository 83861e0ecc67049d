"""What is told of the sources of a run: when one is read again, and what of them is left out."""

from __future__ import annotations

from dsv3_megatron.data.mixture.blend import Blend
from dsv3_megatron.data.source.build import Data
from dsv3_megatron.train.trainer import Callback, CompletedStep, Trainer


class Sources(Callback):
    """Tells before the first step how often sources will be read, and at the step where one begins anew."""

    def __init__(self, data: Data):
        """``data``: that the run reads."""
        self._blend = data.train if isinstance(data.train, Blend) else None
        self._exclusion = data.exclusion
        self._samples = 0

    def begin(self, trainer: Trainer) -> None:
        """Tell what is known in advance, and keep what is left out."""
        self._samples = trainer.progress.samples
        if (digest := self._exclusion.sha256) is not None:
            values = {"step": trainer.progress.step, "path": self._exclusion.path, "sha256": digest}
            trainer.journal.event("excluded", values, f"left out: {self._exclusion}")
            trainer.journal.keep_exclusion(self._exclusion)
        if self._blend is not None and (last := trainer.last_sample()) is not None:
            for line in self._blend.told_epochs(last, trainer.recipe.data.sequence_length):
                trainer.journal.note(line)

    def after_step(self, trainer: Trainer, step: CompletedStep) -> None:
        """Tell of every source that has begun anew in this step."""
        first, self._samples = self._samples, trainer.progress.samples
        if self._blend is None:
            return
        for epoch in self._blend.epochs(first, self._samples):
            values = {"step": trainer.progress.step, "source": epoch.source, "epoch": epoch.epoch}
            line = f"step {trainer.progress.step}: epoch {epoch.epoch} of source {epoch.source} has begun"
            trainer.journal.event("epoch", values, line)
