"""States kept in memory every so many steps, beside training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from dsv3_megatron.checkpoint.memory.saver import MemoryFlags, MemorySaver
from dsv3_megatron.checkpoint.save import Saver
from dsv3_megatron.train.trainer import Callback, CompletedStep, Trainer


class SavingInMemory(Callback):
    """Keeps the state in memory when it is due. Comes before :class:`Saving`, and so ends after it."""

    def __init__(self, memory: MemorySaver, saver: Saver):
        self._memory, self._saver = memory, saver
        self._rollbacks = 0

    def begin(self, trainer: Trainer) -> None:
        """Take how often the run has gone back before."""
        self._rollbacks = trainer.progress.health.rollbacks

    def after_step(self, trainer: Trainer, step: CompletedStep) -> None:
        """Keep the state when it is due; forget all that is kept once the run has gone back to a checkpoint."""
        if trainer.progress.health.rollbacks != self._rollbacks:
            self._rollbacks = trainer.progress.health.rollbacks
            self._memory.forget()
        elif self._memory.due(trainer.progress.step) and not trainer.finished:
            self._memory.save(asdict(trainer.progress))

    def flags(self) -> Sequence[int]:
        """Return what this rank says of the save under way."""
        return self._memory.flags()

    def agreed(self, trainer: Trainer, flags: Sequence[int]) -> None:
        """End the save under way once all ranks are done."""
        self._memory.advance(MemoryFlags(*flags))

    def end(self, trainer: Trainer) -> None:
        """Give back the memory of all hosts where the disk holds as much."""
        with trainer.parts.watchdog.phase("saving a checkpoint", trainer.recipe.run.checkpoint_seconds):
            if self._saver.saved_step == trainer.progress.step:
                self._memory.free()
            else:
                self._memory.finish()
