"""The loop: a batch through the pipeline, an update, and what happens beside it, until the run is over."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dsv3_megatron.data.mixture.blend import Blend
from dsv3_megatron.data.source.build import Data
from dsv3_megatron.health.step_guard import stop_agreed
from dsv3_megatron.health.stop_signals import StopSignals
from dsv3_megatron.optim.regime import Regime
from dsv3_megatron.pipeline.parts import Parts
from dsv3_megatron.train.data.batches import BatchReader
from dsv3_megatron.train.journal import Journal
from dsv3_megatron.train.progress import Progress
from dsv3_megatron.train.step import StepResult, StepValues, train_step


@dataclass(frozen=True)
class CompletedStep:
    """A step that was done. The same on all ranks, but for times.

    Attributes:
        values: what the regime said of it.
        result: what it measured.
        global_batch: its sequences over all ranks.
        tokens: of the whole batch.
        seconds: from the first sample to the last metric, on this rank.
        columns: more of metrics.jsonl; callbacks before the one that writes it may add to them.
    """

    values: StepValues
    result: StepResult
    global_batch: int
    tokens: int
    seconds: float
    columns: dict[str, Any] = field(default_factory=dict)


class Callback:
    """What happens beside the steps of a run; called on every rank, so that any method may hold collectives.

    A new one is a file in callbacks/ and an entry of ``run.callbacks_of``; the loop does not change.
    """

    def begin(self, trainer: Trainer) -> None:
        """The run is resumed, and its first step comes next. Not called where no step is left to do."""

    def may_update(self, trainer: Trainer, loss: float, norm: float) -> bool:
        """Return whether weights, moments and router biases may change by a step of this loss and gradient norm, which
        are the same on all ranks. All callbacks are asked at every step: nothing has changed yet."""
        return True

    def after_step(self, trainer: Trainer, step: CompletedStep) -> None:
        """A step is done, and counted in ``trainer.progress``."""

    def flags(self) -> Sequence[int]:
        """Return small numbers for the one exchange between two steps, always as many."""
        return ()

    def agreed(self, trainer: Trainer, flags: Sequence[int]) -> None:
        """Take the largest of each of :meth:`flags` over all ranks."""

    def end(self, trainer: Trainer) -> None:
        """No step follows: the run is finished, or was asked to stop (``trainer.stopped``). In reverse order."""

    def close(self) -> None:
        """Give back what was changed for the whole process. The last call, after an error too: no collectives."""


class Trainer:
    """One rank of a run. The ranks of a run call every method together.

    Attributes:
        progress: where the run stands; a callback may replace it, as a roll-back does.
        journal: what the run tells and writes down.
        first_step: steps that were done before this start.
        stopped: whether the run was asked to stop before it was finished; known at its end.
        summary: what the run ended with; callbacks add to it.
    """

    def __init__(self, parts: Parts, data: Data, callbacks: Sequence[Callback], journal: Journal, progress: Progress):
        """Take what a rank trains with, in the state that ``progress`` counts.

        Args:
            callbacks: called in this order after a step, in reverse at the end.
        """
        self.recipe, self.parts, self.data = parts.recipe, parts, data
        self.callbacks, self.journal, self.progress = callbacks, journal, progress
        self.regime = Regime(self.recipe.optim, self.recipe.data.sequence_length)
        self.first_step, self.stopped = progress.step, False
        self.summary: dict[str, Any] = {"before": None, "after": None}
        self._reader = BatchReader(parts, data, self.regime)
        self._signals: StopSignals | None = None

    @property
    def finished(self) -> bool:
        """Whether the run has consumed its steps or tokens, or a source that it must not read twice."""
        run = self.recipe.run
        by_steps = run.steps is not None and self.progress.step >= run.steps
        by_tokens = run.tokens is not None and self.progress.tokens >= run.tokens
        return by_steps or by_tokens or self.ended_source is not None

    @property
    def ended_source(self) -> str | None:
        """Why the text of the run is at its end; None where the next step has all its samples."""
        source, samples = self.data.train, self.progress.samples
        if not isinstance(source, Blend) or (left := source.samples_until_end(samples)) is None:
            return None
        return source.why_ended() if self._reader.following(self.progress).next - samples > left else None

    def last_sample(self) -> int | None:
        """Return about how many samples the run will have read at its end; None where nothing limits it."""
        run, length = self.recipe.run, self.recipe.data.sequence_length
        by_steps = None if run.steps is None else self.regime.tokens_of_step(run.steps)
        tokens = min((limit for limit in (by_steps, run.tokens) if limit is not None), default=None)
        return None if tokens is None else self.progress.samples + max(0, tokens - self.progress.tokens) // length

    def train(self, signals: StopSignals) -> dict[str, Any]:
        """Train to the end, or until a signal asks to stop; return the summary. Saves in both cases."""
        try:
            return self._train(signals)
        finally:
            self._reader.close()
            for callback in reversed(self.callbacks):
                callback.close()

    def _train(self, signals: StopSignals) -> dict[str, Any]:
        start = time.perf_counter()
        self._signals = signals
        with signals:
            if not self.is_over(signals):  # it may have been asked to stop while it was starting
                for callback in self.callbacks:
                    callback.begin(self)
                while not self.is_over(signals):
                    self.step()
            self.stopped = not self.finished
            if reason := self.ended_source:
                self.summary["ended"] = reason
                self.journal.event("source_ended", {"step": self.progress.step, "reason": reason}, f"ended: {reason}")
        for callback in reversed(self.callbacks):
            callback.end(self)
        counted = {name: value for name, value in asdict(self.progress).items() if name != "health"}
        seconds = time.perf_counter() - start
        self.summary = {**counted, "seconds": seconds, "stopped_by_signal": self.stopped, **self.summary}
        self.journal.close(self.summary, finished=not self.stopped)
        return self.summary

    def is_over(self, signals: StopSignals) -> bool:
        """Return whether no step follows: all are done, or any rank was asked to stop.

        The exchange that this takes carries the callbacks' flags too.
        """
        if self.finished:
            return True
        flags = [callback.flags() for callback in self.callbacks]
        self.parts.watchdog.enter("the exchange between steps")
        stop, *agreed = stop_agreed(signals.wanted, self.parts.device, [flag for each in flags for flag in each])
        self.parts.watchdog.leave()
        for callback, each in zip(self.callbacks, flags):
            callback.agreed(self, agreed[: len(each)])
            agreed = agreed[len(each) :]
        return bool(stop)

    def asked_to_stop(self) -> bool:
        """Return whether any rank was asked to stop; all ranks ask together. For what takes long beside the steps: a
        batch job has minutes left then."""
        wanted = self._signals is not None and self._signals.wanted
        return bool(stop_agreed(wanted, self.parts.device)[0])

    def step(self) -> None:
        """Do one optimizer step, and what follows a step."""
        completed = self._train_on_next_batch()
        for callback in self.callbacks:
            self.parts.watchdog.enter(f"what follows a step: {type(callback).__name__}")
            callback.after_step(self, completed)
        self.parts.watchdog.leave()

    def _train_on_next_batch(self) -> CompletedStep:
        start = time.perf_counter()
        progress, values = self.progress, self._values()
        self.parts.watchdog.enter("the samples of a step")
        read = self._reader.take(progress)
        result = train_step(self.parts, read.microbatches, values, self._may_update, read.waited_seconds)
        self.parts.watchdog.leave()
        batch = read.samples.count
        tokens = batch * self.recipe.data.sequence_length
        progress.step += 1
        progress.samples = read.samples.next
        progress.tokens += tokens
        progress.skipped += result.skipped
        columns = {} if read.excluded_tokens is None else {"excluded_tokens": read.excluded_tokens}
        return CompletedStep(values, result, batch, tokens, time.perf_counter() - start, columns)

    def _values(self) -> StepValues:
        """Return what the regime says of the step that follows."""
        regime, tokens = self.regime, self.progress.tokens
        return StepValues(
            learning_rate=regime.learning_rate(tokens),
            mtp_weight=regime.mtp_weight(tokens),
            bias_speed=regime.bias_speed(tokens),
            balance_weight=regime.balance_weight(tokens),
            mtp_depth_decay=regime.mtp_depth_decay(tokens),
        )

    def _may_update(self, loss: float, norm: float) -> bool:
        return all([callback.may_update(self, loss, norm) for callback in self.callbacks])
