"""Checkpoints: every so many steps or minutes, beside training where the recipe says so, and at the end."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict

from dsv3_megatron.checkpoint.save import Flags, Saver
from dsv3_megatron.train.trainer import Callback, CompletedStep, Trainer

EARLY_STOP = "asked to stop before the first step: nothing to save, the next start resumes from here"


class Saving(Callback):
    """Saves the run when it is due, and moves a save under way on."""

    def __init__(self, saver: Saver):
        self.saver = saver

    def after_step(self, trainer: Trainer, step: CompletedStep) -> None:
        """Save when it is due; at the end of the run, :meth:`end` does."""
        if self.saver.due(trainer.progress.step) and not trainer.finished:
            with self._watched(trainer):
                self.saver.save(asdict(trainer.progress))

    def flags(self) -> Sequence[int]:
        """Return what this rank says of the save under way."""
        return self.saver.flags()

    def agreed(self, trainer: Trainer, flags: Sequence[int]) -> None:
        """Begin the next phase of the save once all ranks are done with one, or a save that is due by time."""
        step = trainer.progress.step
        self.saver.advance(Flags(*flags), step)
        if self.saver.is_late and step > trainer.first_step and step != self.saver.saved_step:
            with self._watched(trainer):
                self.saver.save(asdict(trainer.progress))

    def end(self, trainer: Trainer) -> None:
        """Save the last step, unless it is saved, or nothing was done."""
        if trainer.stopped and trainer.progress.step == trainer.first_step:
            trainer.journal.event("stopped_early", {"step": trainer.progress.step}, EARLY_STOP)
        else:
            left = trainer.recipe.cluster.slurm.warning_seconds if trainer.stopped else None
            with self._watched(trainer):
                self.saver.save_finally(asdict(trainer.progress), within_seconds=left)

    @staticmethod
    def _watched(trainer: Trainer) -> AbstractContextManager[None]:
        return trainer.parts.watchdog.phase("saving a checkpoint", trainer.recipe.run.checkpoint_seconds)
