"""The rank that slows the others down, looked for every so many steps."""

from __future__ import annotations

from dataclasses import asdict

from dsv3_megatron.health.settings import HealthSettings
from dsv3_megatron.health.stragglers import Slowest, WorkClock
from dsv3_megatron.pipeline.parts import Parts
from dsv3_megatron.train.trainer import Callback, CompletedStep, Trainer


class Stragglers(Callback):
    """Compares the ranks' times for the same work, and warns of one that is slow."""

    def __init__(self, settings: HealthSettings, parts: Parts):
        self._settings = settings
        self._clock = WorkClock(list(parts.chunks.values()), parts.device)
        self._slowest: Slowest | None = None

    def after_step(self, trainer: Trainer, step: CompletedStep) -> None:
        """Compare when it is due. The latest comparison is a column of every step."""
        number = trainer.progress.step
        if number % self._settings.straggler_every_steps == 0:
            self._slowest = self._clock.compare()
            if self._slowest.ratio > self._settings.straggler_ratio:
                self._warn(trainer, self._slowest)
        if self._slowest:
            step.columns.update(slowest_rank=self._slowest.rank, slowest_ratio=self._slowest.ratio)

    def _warn(self, trainer: Trainer, slowest: Slowest) -> None:
        values = {"step": trainer.progress.step, **asdict(slowest)}
        ratio = slowest.ratio
        text = f"warning: rank {slowest.rank} on {slowest.host} took {ratio:.1f} times the median rank's time"
        trainer.journal.event("straggler", values, text)
