"""What this rank reads of every step: which samples, read ahead, and nothing where its stages look at none."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from dsv3_megatron.data.mixture.blend import Blend
from dsv3_megatron.data.source.ahead import ReadAhead
from dsv3_megatron.data.source.build import Data
from dsv3_megatron.data.source.samples import blank_batches, sample_numbers, share_of_step
from dsv3_megatron.optim.regime import Regime
from dsv3_megatron.pipeline.parts import Parts
from dsv3_megatron.train.progress import Progress


@dataclass(frozen=True)
class StepSamples:
    """The samples of one step: the next ``count`` numbers from ``first`` on that are not excluded.

    Attributes:
        next: the number from which on the step that follows reads.
    """

    first: int
    count: int
    next: int


@dataclass(frozen=True)
class StepBatches:
    """A step's batches on this rank.

    Attributes:
        microbatches: each [B, S] tokens, labels, position_ids, loss_mask, and documents where they are isolated.
        waited_seconds: how long the step had to wait for them.
        excluded_tokens: places of the whole step's samples that excluded documents leave empty; None where none are
            excluded, and on all ranks but the first, which writes it down.
    """

    samples: StepSamples
    microbatches: list[dict[str, Tensor]]
    waited_seconds: float
    excluded_tokens: int | None = None


class BatchReader:
    """The batches of one step after another, ``data.read_ahead`` steps of them read before they are asked for."""

    def __init__(self, parts: Parts, data: Data, regime: Regime):
        """Take what says how many samples a step has, and what they are."""
        self._parts, self._source, self._regime = parts, data.train, regime
        self._excluded = data.exclusion.samples
        self._counts_excluded = bool(data.exclusion.documents) and dist.get_rank() == 0
        self._ahead = ReadAhead(self._read)

    def take(self, progress: Progress) -> StepBatches:
        """Return the batches of the step that follows ``progress``.

        Raises: DataError: a sample cannot be read.
        """
        start = time.perf_counter()
        now, *following = self._steps(progress, 1 + self._parts.recipe.data.read_ahead)
        microbatches, excluded = self._ahead.take(now, following)
        return StepBatches(now, microbatches, time.perf_counter() - start, excluded)

    def following(self, progress: Progress) -> StepSamples:
        """Return the samples of the step that follows ``progress``."""
        return next(self._steps(progress, 1))

    def close(self) -> None:
        """Stop reading ahead."""
        self._ahead.close()

    def _steps(self, progress: Progress, steps: int) -> Iterator[StepSamples]:
        """Yield the samples of the next steps, as long as none is rolled back."""
        tokens, first = progress.tokens, progress.samples
        for _ in range(steps):
            count = self._regime.global_batch(tokens)
            _, after = sample_numbers(first, count, self._excluded)
            yield StepSamples(first, count, after)
            tokens, first = tokens + count * self._regime.sequence_length, after

    def _read(self, samples: StepSamples) -> tuple[list[dict[str, Tensor]], int | None]:
        """Return this rank's microbatches, and what :class:`StepBatches` says of excluded tokens."""
        recipe, dp = self._parts.recipe, self._parts.layout.dp
        micro_batch, excluded = recipe.optim.micro_batch, None
        numbers, _ = sample_numbers(samples.first, samples.count, self._excluded)
        if self._counts_excluded:
            assert isinstance(self._source, Blend), "documents are excluded by name from shards alone"
            excluded = self._source.excluded_tokens(numbers)
        if not self._parts.reads_samples:
            blank = blank_batches(samples.count // dp // micro_batch, micro_batch, recipe.data.sequence_length)
            return blank, excluded
        rank = self._parts.data_rank
        return share_of_step(self._source, numbers, micro_batch=micro_batch, dp_rank=rank, dp=dp), excluded
