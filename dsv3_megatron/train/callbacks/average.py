"""The average of the weights (optim.ema_decay), updated beside the passes of the next step."""

from __future__ import annotations

from dsv3_megatron.pipeline.parts import WeightAverage
from dsv3_megatron.train.trainer import Callback, CompletedStep, Trainer


class Averaging(Callback):
    """Averages the weights in after every update."""

    def __init__(self, average: WeightAverage):
        self._average = average

    def may_update(self, trainer: Trainer, loss: float, norm: float) -> bool:
        """Wait: the average may still read the weights of the step before."""
        self._average.wait()
        return True

    def after_step(self, trainer: Trainer, step: CompletedStep) -> None:
        """Begin to average in the new weights."""
        if not step.result.skipped:
            self._average.start()
