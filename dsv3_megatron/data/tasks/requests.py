"""Examples -> tokens whose likelihood a model is asked for, cut where lm-evaluation-harness cuts (its HFLM, 0.4.13):

- blanks and line breaks at the end of the context belong to the continuation;
- context and continuation are encoded as one text, of which the tokens after as many as the context alone has are
  scored; they are read after those of the context alone, which differ where a token would cover the border;
- without a context the begin token (or the end token) stands for it;
- what does not fit into a sequence is cut off from the left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsv3_megatron.data.source.samples import Sample
from dsv3_megatron.data.tasks.read import Task, read_task
from dsv3_megatron.data.tasks.settings import EvaluateSettings
from dsv3_megatron.data.tokenizer import Tokenizer
from parallel.errors import DataError


@dataclass(frozen=True)
class Request:
    """A text of which the last tokens are scored.

    Attributes:
        ids: [T + 1] int64: T tokens are read, T predicted.
        scored: how many of the last are scored.
    """

    ids: np.ndarray
    scored: int

    @property
    def length(self) -> int:
        """Tokens that the model reads."""
        return len(self.ids) - 1

    def sample(self, length: int) -> Sample:
        """Return the request as a sequence of ``length`` tokens, filled up behind, where nothing is scored."""
        tokens, labels = np.zeros(length, dtype=np.int64), np.zeros(length, dtype=np.int64)
        weights = np.zeros(length, dtype=np.float32)
        tokens[: self.length], labels[: self.length] = self.ids[:-1], self.ids[1:]
        weights[self.length - self.scored : self.length] = 1.0
        return Sample(tokens, labels, weights)


@dataclass(frozen=True)
class EncodedTask:
    """A task and its requests: one for every choice of every example, in order.

    Attributes:
        cut: requests that were longer than a sequence.
    """

    task: Task
    requests: tuple[Request, ...]
    cut: int


def read_tasks(settings: EvaluateSettings, tokenizer: Tokenizer | None, sequence_length: int) -> list[EncodedTask]:
    """Return the tasks of a recipe, encoded.

    Raises: DataError: a file is no task, or a choice has no tokens or too many.
    """
    if not settings.tasks:
        return []
    assert tokenizer is not None, "Recipe.check lets no tasks through where the data is no text"
    return [encode(read_task(path, settings.examples), tokenizer, sequence_length) for path in settings.tasks]


def encode(task: Task, tokenizer: Tokenizer, sequence_length: int) -> EncodedTask:
    """Return a task as requests. Raises DataError: a choice has no tokens of its own, or more than a sequence."""
    places = [(example, choice) for example, whole in enumerate(task.examples) for choice in range(len(whole.choices))]
    heads = [example.context.rstrip() for example in task.examples]
    ids_of_heads = tokenizer.encode_prompts(heads)
    texts = [task.examples[example].context + task.examples[example].choices[choice] for example, choice in places]
    requests = []
    prefix = tokenizer.end if tokenizer.begin is None else tokenizer.begin
    for (example, choice), whole in zip(places, tokenizer.encode_prompts(texts)):
        before = ids_of_heads[example] if heads[example] else np.asarray([prefix])
        if not heads[example] and len(whole) and whole[0] != prefix:
            whole = np.concatenate([before, whole])
        ids, scored = np.concatenate([before, whole[len(before) :]]), len(whole) - len(before)
        if not 1 <= scored <= sequence_length:
            what = "adds no token to the context" if scored < 1 else f"has {scored:,} tokens"
            raise DataError(
                f"{task.path}:{task.lines[example]}: choices.{choice} {what}, and 1 to {sequence_length:,} can be "
                "scored (data.sequence_length); leave the example out"
            )
        requests.append((ids, scored))
    most = sequence_length + 1
    cut = sum(len(ids) > most for ids, _ in requests)
    return EncodedTask(task, tuple(Request(np.asarray(ids[-most:], np.int64), scored) for ids, scored in requests), cut)
