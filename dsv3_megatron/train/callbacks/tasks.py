"""Accuracy in multiple-choice tasks: every so many steps, and at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from dsv3_megatron.data.tasks.requests import EncodedTask
from dsv3_megatron.data.tasks.results import TaskResult, result_of
from dsv3_megatron.pipeline.parts import Parts
from dsv3_megatron.train.evaluation.scoring import Scores, score_requests
from dsv3_megatron.train.trainer import Callback, CompletedStep, Trainer


class Tasks(Callback):
    """Measures what the model achieves in tasks. A request to stop ends it: there are minutes left then."""

    def __init__(self, tasks: Sequence[EncodedTask], every_steps: int):
        """``every_steps``: 0 = at the end only."""
        self._tasks, self._every = tasks, every_steps

    def after_step(self, trainer: Trainer, step: CompletedStep) -> None:
        """Measure when it is due; at the end of the run, :meth:`end` does."""
        if self._every and trainer.progress.step % self._every == 0 and not trainer.finished:
            self.evaluate(trainer)

    def end(self, trainer: Trainer) -> None:
        """Measure what the run has become, unless it was asked to stop."""
        if not trainer.stopped and (results := self.evaluate(trainer)):
            trainer.summary["tasks"] = {result.task: result.values() for result in results}

    def evaluate(self, trainer: Trainer) -> list[TaskResult]:
        """Return the results of all tasks, and write them down; none where the run is asked to stop meanwhile."""
        step = trainer.progress.step
        results = results_of(trainer.parts, self._tasks, lambda: not trainer.asked_to_stop())
        if results is None:
            trainer.journal.event("tasks_left_out", {"step": step}, f"step {step}: asked to stop, tasks are left out")
        for result in results or ():
            trainer.journal.task(step, result)
        return results or []


def results_of(
    parts: Parts, tasks: Sequence[EncodedTask], go_on: Callable[[], bool] = lambda: True
) -> list[TaskResult] | None:
    """Return the result of every task, None where ``go_on``, which all ranks ask together, says no meanwhile."""
    scores = score_requests(parts, [request for task in tasks for request in task.requests], go_on)
    return None if scores is None else list(_by_task(tasks, scores))


def _by_task(tasks: Sequence[EncodedTask], scores: Scores) -> Iterator[TaskResult]:
    start = 0
    for task in tasks:
        mine = scores[start : (start := start + len(task.requests))]
        yield result_of(task, mine.log_likelihoods, mine.greedy)
