"""The order of samples: a pure function of the seed and of how many sequences were consumed.

Nothing is remembered between steps. Sample number i of a run is always the same sequence, so a resumed run, a run on
other ranks and a run with another microbatch see the same samples in the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

MOST_SAMPLES = 1 << 48  # that a run can count; of 4,096 tokens each 10^18
ORDER = 2  # by which sample numbers become sequences: raised whenever the same settings would read another sequence


@dataclass(frozen=True)
class Sample:
    """One sequence.

    Args:
        tokens: [S] int64, what the model reads.
        labels: [S] int64, what it shall predict at each place.
        weights: [S] float32, how much each prediction counts; 0 where there is nothing to predict.
        documents: [S] int32, non-decreasing numbers of the documents that attention and multi-token prediction must
            not leave; None where they may.
    """

    tokens: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    documents: np.ndarray | None = None

    @classmethod
    def of_ids(cls, ids: np.ndarray, end: int | None = None) -> Sample:
        """Return [S + 1] ids as a sample. With ``end``, that token ends a document, whose end predicts nothing."""
        ids = np.asarray(ids, dtype=np.int64)
        tokens, weights, documents = ids[:-1], np.ones(len(ids) - 1, dtype=np.float32), None
        if end is not None:
            ends = tokens == end
            weights[ends] = 0.0
            documents = (np.cumsum(ends) - ends).astype(np.int32)
        return cls(tokens, ids[1:], weights, documents)


class SampleSource(Protocol):
    """An endless, numbered supply of sequences."""

    def sample(self, number: int) -> Sample:
        """Return sequence ``number``."""


class TokenWindows:
    """Sequences cut from one long array of tokens, each token a target once an epoch, shuffled anew every epoch.

    ``end``: the token that ends a document, where documents are to be isolated.
    """

    def __init__(
        self, tokens: np.ndarray, sequence_length: int, seed: int, *, shuffle: bool = True, end: int | None = None
    ):
        self.tokens, self.sequence_length, self.seed, self.shuffle = tokens, sequence_length, seed, shuffle
        self.end = end
        self.count = (len(tokens) - 1) // sequence_length
        assert self.count > 0, (len(tokens), sequence_length)

    def sample(self, number: int) -> Sample:
        """Return sequence ``number``."""
        epoch, index = divmod(number, self.count)
        if self.shuffle:
            index = permuted(index, self.count, f"{self.seed}/{epoch}")
        start = index * self.sequence_length
        return Sample.of_ids(self.tokens[start : start + self.sequence_length + 1], self.end)


def permuted(index: int, count: int, key: str) -> int:
    """Return where ``index`` goes in a pseudo-random permutation of ``range(count)`` named by ``key``.

    A four-round Feistel network over the next power of four, walked until it lands inside the range: no table, so an
    epoch of any length costs nothing to start.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=32).digest(), dtype=np.uint64)
    while True:
        left, right = index >> half, index & mask
        for round_key in keys:
            mixed = (right * 0x9E3779B97F4A7C15 + int(round_key)) & 0xFFFFFFFFFFFFFFFF
            mixed = (mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ ((mixed >> 32) & mask)
        index = (left << half) | right
        if index < count:
            return index


class Synthetic:
    """Sequences that follow a rule a model can learn: counting in steps, each with its own start and step."""

    def __init__(self, vocab_size: int, sequence_length: int, seed: int):
        self.vocab_size, self.sequence_length, self.seed = vocab_size, sequence_length, seed

    def sample(self, number: int) -> Sample:
        """Return sequence ``number``."""
        random = np.random.Generator(np.random.Philox(key=self.seed, counter=number << 64))
        start, step = random.integers(self.vocab_size), 1 + random.integers(4)
        return Sample.of_ids((start + step * np.arange(self.sequence_length + 1)) % self.vocab_size)


class Recall:
    """Facts at the start of a sequence, questions after them, noise between: what only the context can answer.

    Each of ``SLOTS`` slots is given one of ``VALUES`` values once, in the first eighth of the sequence. Later tokens
    ask for a slot, and their label is its value; only answers count in the loss. Nothing but attention over the
    distance from question to fact can tell it: without, the loss is ln(VALUES). A longer sequence asks over a longer
    distance.
    """

    SLOTS, VALUES = 8, 8
    FIRST_QUESTION = SLOTS * VALUES  # the tokens below are facts; then one question for each slot; then noise
    FIRST_NOISE = FIRST_QUESTION + SLOTS

    def __init__(self, vocab_size: int, sequence_length: int, seed: int):
        self.vocab_size, self.sequence_length, self.seed = vocab_size, sequence_length, seed

    def sample(self, number: int) -> Sample:
        """Return sequence ``number``; about a quarter of the tokens after the facts are questions."""
        random = np.random.Generator(np.random.Philox(key=self.seed, counter=number << 64))
        length, facts = self.sequence_length, self.sequence_length // 8
        tokens = random.integers(self.FIRST_NOISE, self.vocab_size, length)
        values = random.integers(self.VALUES, size=self.SLOTS)
        places = random.choice(facts, self.SLOTS, replace=False)
        tokens[places] = np.arange(self.SLOTS) * self.VALUES + values
        asked = facts + np.flatnonzero(random.random(length - facts) < 0.25)
        slots = random.integers(self.SLOTS, size=len(asked))
        tokens[asked] = self.FIRST_QUESTION + slots
        labels, weights = np.zeros(length, dtype=np.int64), np.zeros(length, dtype=np.float32)
        labels[asked] = slots * self.VALUES + values[slots]
        weights[asked] = 1.0
        return Sample(tokens, labels, weights)


def make_batch(samples: list[Sample], masks: list[float] | None = None) -> dict[str, Tensor]:
    """Return samples as a batch: tokens, labels, position_ids [B, S] int64, loss_mask [B, S] float32, and documents
    [B, S] int32 where they are isolated.

    ``masks`` weighs whole samples; 0.0 leaves one out of the loss.
    """

    def stacked(field: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(sample, field) for sample in samples]))

    tokens, weights = stacked("tokens"), stacked("weights")
    if masks is not None:
        weights = weights * torch.tensor(masks).unsqueeze(1)
    batch = {
        "tokens": tokens,
        "labels": stacked("labels"),
        "position_ids": torch.arange(tokens.shape[1]).expand(len(samples), -1).contiguous(),
        "loss_mask": weights,
    }
    if samples[0].documents is not None:
        batch["documents"] = stacked("documents")
    return batch


def blank_batches(count: int, micro_batch: int, sequence_length: int) -> list[dict[str, Tensor]]:
    """Return ``count`` microbatches without text, for stages that look at none: only their shapes mean something."""
    ids = torch.zeros(micro_batch, sequence_length, dtype=torch.int64)
    blank = {"tokens": ids, "labels": ids, "position_ids": ids, "loss_mask": torch.zeros(micro_batch, sequence_length)}
    return [dict(blank) for _ in range(count)]


SampleRange = tuple[int, int]  # numbers from the first up to the second, which is not one of them


def sample_numbers(first: int, count: int, excluded: Sequence[SampleRange] = ()) -> tuple[Sequence[int], int]:
    """Return the next ``count`` sample numbers from ``first`` on, and where the step that follows begins.

    Args:
        excluded: ranges that are stepped over, ascending, apart from each other.
    """
    numbers: list[int] = []
    for start, stop in excluded:
        if stop <= first:
            continue
        if first + count - len(numbers) <= start:
            break
        numbers += range(first, start)
        first = stop
    if not numbers:
        return range(first, first + count), first + count
    numbers += range(first, first + count - len(numbers))
    return numbers, numbers[-1] + 1


def numbers_before(stop: int, count: int, excluded: Sequence[SampleRange] = ()) -> list[int]:
    """Return the ``count`` sample numbers of the step after which the next one begins at ``stop``: what
    :func:`sample_numbers` returned for it, wherever it began. Fewer where there are no more."""
    numbers: list[int] = []
    for start, after in (*reversed(excluded), (0, 0)):
        if after > stop:
            stop = min(stop, start)
            continue
        taken = range(max(after, stop - (count - len(numbers))), stop)
        numbers[:0] = taken
        if len(numbers) == count:
            break
        stop = start
    return numbers


def step_batches(
    source: SampleSource, *, first: int, global_batch: int, micro_batch: int, dp_rank: int, dp: int
) -> list[dict[str, Tensor]]:
    """Return one data-parallel rank's microbatches of a step of samples ``first`` to ``first + global_batch - 1``."""
    return share_of_step(source, range(first, first + global_batch), micro_batch=micro_batch, dp_rank=dp_rank, dp=dp)


def share_of_step(
    source: SampleSource, numbers: Sequence[int], *, micro_batch: int, dp_rank: int, dp: int
) -> list[dict[str, Tensor]]:
    """Return one data-parallel rank's microbatches of a step of these samples: rank d takes the d-th of ``dp`` equal
    runs of them."""
    share = len(numbers) // dp
    mine = numbers[dp_rank * share : (dp_rank + 1) * share]
    return [make_batch([source.sample(n) for n in mine[i : i + micro_batch]]) for i in range(0, share, micro_batch)]


def evaluation_batches(
    source: SampleSource, *, count: int, micro_batch: int, dp_rank: int, dp: int
) -> list[dict[str, Tensor]]:
    """Return one data-parallel rank's microbatches of the first ``count`` samples; what fills the last is masked."""
    share = -(-count // (dp * micro_batch)) * micro_batch
    batches = []
    for start in range(dp_rank * share, (dp_rank + 1) * share, micro_batch):
        numbers = range(start, start + micro_batch)
        samples = [source.sample(min(n, count - 1)) for n in numbers]
        batches.append(make_batch(samples, [float(n < count) for n in numbers]))
    return batches
