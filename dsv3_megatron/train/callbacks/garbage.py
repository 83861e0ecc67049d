"""Python's garbage collector: at the same steps on all ranks, and at no other time.

It stops its process for a moment, whenever so many objects were made; of thousands of ranks one or another always
stands, and all others wait for it in the next exchange.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

from dsv3_megatron.checkpoint.save import Saver
from dsv3_megatron.train.trainer import Callback, CompletedStep, Trainer


class GarbageCollection(Callback):
    """Collects every so many steps, and when a save has begun or ended, which leaves copies of the state in cycles. In
    between nothing is collected; what training began with is never looked at."""

    def __init__(self, every_steps: int, saver: Saver):
        self._every, self._saver = every_steps, saver
        self._save_seen = self._save_now()
        self._was_enabled: bool | None = None

    def begin(self, trainer: Trainer) -> None:
        """Switch automatic collection off, and leave out of every collection what the run was built of."""
        self._was_enabled = gc.isenabled()
        gc.disable()
        gc.collect()
        gc.freeze()

    def after_step(self, trainer: Trainer, step: CompletedStep) -> None:
        """Collect when it is due."""
        if self._save_has_moved() or trainer.progress.step % self._every == 0:
            gc.collect()

    def agreed(self, trainer: Trainer, flags: Sequence[int]) -> None:
        """Collect after a save beside training; all ranks have just agreed that it is over."""
        if self._save_has_moved():
            gc.collect()

    def _save_now(self) -> tuple[bool, int | None]:
        return self._saver.busy, self._saver.saved_step

    def _save_has_moved(self) -> bool:
        before, self._save_seen = self._save_seen, self._save_now()
        return before != self._save_seen

    def close(self) -> None:
        """Give the process back as it was: another run may follow in it."""
        if self._was_enabled is not None:
            gc.unfreeze()
            if self._was_enabled:
                gc.enable()
        self._was_enabled = None
