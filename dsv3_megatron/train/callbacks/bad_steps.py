"""Steps that are not taken, and what follows when there are too many of them in a row."""

from __future__ import annotations

from dsv3_megatron.checkpoint.find import load_newest
from dsv3_megatron.checkpoint.load import load_checkpoint
from dsv3_megatron.checkpoint.manifest import checkpoints
from dsv3_megatron.checkpoint.save import Saver
from dsv3_megatron.health.settings import HealthSettings
from dsv3_megatron.health.step_guard import StepGuard, nonfinite_gradients
from dsv3_megatron.pipeline.parts import named_parameters
from dsv3_megatron.train.progress import Progress
from dsv3_megatron.train.trainer import Callback, CompletedStep, Trainer
from parallel.errors import HealthError


class BadSteps(Callback):
    """Skips a step whose loss or gradient norm is far out; after too many in a row rolls back, or ends the run."""

    def __init__(self, settings: HealthSettings, saver: Saver):
        self._settings, self._saver = settings, saver
        self._guard = StepGuard(settings, Progress().health)

    def may_update(self, trainer: Trainer, loss: float, norm: float) -> bool:
        """Return whether loss and norm are finite and near the recent ones."""
        self._guard.state = trainer.progress.health
        return self._guard.allows(loss, norm)

    def after_step(self, trainer: Trainer, step: CompletedStep) -> None:
        """Tell of a skipped step; roll back or give up after too many."""
        progress = trainer.progress
        if self._guard.reason:
            why = {"step": progress.step, "reason": self._guard.reason, "in_row": progress.health.skipped_in_row}
            trainer.journal.event("skipped", why, f"warning: step {progress.step} skipped: {self._guard.reason}")
        if self._guard.exhausted:
            self._roll_back(trainer)

    def _roll_back(self, trainer: Trainer) -> None:
        """Go back to the last checkpoint, past the data in between. Raises: HealthError: it may not, or cannot."""
        failed, what = trainer.progress, self._what_happened(trainer)
        if failed.health.rollbacks >= self._settings.rollbacks:
            raise HealthError(
                f"{what}; lower optim.learning_rate, look at the data from sample {failed.samples}, or set "
                "health.rollbacks to go back to the last checkpoint and past this data"
            )
        with trainer.parts.watchdog.phase("going back to a checkpoint", trainer.recipe.run.checkpoint_seconds):
            self._saver.finish(failed.step)
            found, _, wrong = load_newest(
                lambda: checkpoints(self._saver.folder),
                lambda found: load_checkpoint(found, trainer.parts, training=True),
            )
        if found is None:
            raise HealthError(f"{what}; there is no valid checkpoint to go back to ({'; '.join(wrong) or 'none'})")
        trainer.progress = progress = Progress.of(found.progress)
        progress.samples, progress.health.rollbacks = failed.samples, failed.health.rollbacks + 1
        progress.health.skipped_in_row = 0
        trainer.journal.rewind(progress.step)
        values = {
            "step": failed.step,
            "to_step": progress.step,
            "samples": progress.samples,
            "rollbacks": progress.health.rollbacks,
        }
        text = f"warning: {what}; went back to {found.path}, continuing from sample {progress.samples}"
        trainer.journal.event("rolled_back", values, text)

    def _what_happened(self, trainer: Trainer) -> str:
        bad = nonfinite_gradients(named_parameters(trainer.parts))
        what = f"{self._settings.skip_limit} steps in a row were skipped, the last because {self._guard.reason}"
        return f"{what}; not finite: the gradient of {', '.join(bad)}" if bad else what
