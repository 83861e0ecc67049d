"""Python's garbage collector: at the same steps on all ranks, and at no other time.

It stops its process for a moment, whenever so many objects were made; of thousands of ranks one or another always
stands, and all others wait for it in the next exchange. Neither a step nor a save leaves tensors in cycles, so that no
memory to speak of waits for it.
"""

from __future__ import annotations

import gc

from dsv3_megatron.train.trainer import Callback, CompletedStep, Trainer


class GarbageCollection(Callback):
    """Collects every so many steps. In between nothing is collected; what training began with is never looked at."""

    def __init__(self, every_steps: int):
        self._every = every_steps
        self._was_enabled: bool | None = None

    def begin(self, trainer: Trainer) -> None:
        """Switch automatic collection off, and leave out of every collection what the run was built of."""
        self._was_enabled = gc.isenabled()
        gc.disable()
        gc.collect()
        gc.freeze()

    def after_step(self, trainer: Trainer, step: CompletedStep) -> None:
        """Collect when it is due."""
        if trainer.progress.step % self._every == 0:
            gc.collect()

    def close(self) -> None:
        """Give the process back as it was: another run may follow in it."""
        if self._was_enabled is not None:
            gc.unfreeze()
            if self._was_enabled:
                gc.enable()
        self._was_enabled = None
