"""Log-likelihoods -> what a task is measured by, under the names that lm-evaluation-harness gives it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dsv3_megatron.data.tasks.read import Task
from dsv3_megatron.data.tasks.requests import EncodedTask


@dataclass(frozen=True)
class TaskResult:
    """What a model achieved in a task; None where a task has no such measure.

    Attributes:
        acc: share of examples whose answer is the likeliest choice. With one choice only: share in which each of its
            tokens is the model's own.
        acc_norm: the same with log-likelihoods divided by the characters of the choice.
        acc_bytes: divided by its bytes in UTF-8.
        perplexity: with one choice only, exp of minus the mean log-likelihood of a choice.
        cut: of the ``requests`` (choices of all examples), those whose context did not fit into a sequence.
    """

    task: str
    examples: int
    acc: float
    acc_norm: float | None = None
    acc_bytes: float | None = None
    perplexity: float | None = None
    cut: int = 0
    requests: int = 0

    def values(self) -> dict[str, Any]:
        """Return what is known, by name."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def line(self) -> str:
        """Return the result for a person."""
        measures = [f"acc {self.acc:.4f}"]
        for name in ("acc_norm", "acc_bytes", "perplexity"):
            if (value := getattr(self, name)) is not None:
                measures.append(f"{name} {value:.4g}" if name == "perplexity" else f"{name} {value:.4f}")
        cut = f"; {self.cut:,} of {self.requests:,} texts were cut at the left to fit" if self.cut else ""
        return f"{self.task}: {', '.join(measures)} ({self.examples:,} example{'s' * (self.examples != 1)}{cut})"


def result_of(encoded: EncodedTask, log_likelihoods: np.ndarray, greedy: np.ndarray) -> TaskResult:
    """Return the result of a task.

    Args:
        log_likelihoods, greedy: [requests] of its requests, in nats, and whether all tokens were the model's own.
    """
    task = encoded.task
    counts: dict[str, Any] = {
        "task": task.name,
        "examples": len(task.examples),
        "cut": encoded.cut,
        "requests": len(encoded.requests),
    }
    if not task.has_choices:
        with np.errstate(over="ignore"):
            return TaskResult(**counts, acc=float(greedy.mean()), perplexity=float(np.exp(-log_likelihoods.mean())))
    characters, size = (
        np.asarray([measure(choice) for example in task.examples for choice in example.choices], dtype=np.float64)
        for measure in (len, lambda choice: len(choice.encode()))
    )
    return TaskResult(
        **counts,
        acc=_accuracy(task, log_likelihoods),
        acc_norm=_accuracy(task, log_likelihoods / characters),
        acc_bytes=_accuracy(task, log_likelihoods / size),
    )


def _accuracy(task: Task, scores: np.ndarray) -> float:
    """Return the share of examples whose answer has the best score, of equals the first; NaN if a score is none."""
    if not np.isfinite(scores).all():
        return float("nan")
    ends = np.cumsum([len(example.choices) for example in task.examples])
    best = [int(part.argmax()) for part in np.split(scores, ends[:-1])]
    return float(np.mean([found == example.answer for found, example in zip(best, task.examples)]))
