"""What the model makes of sequences under any layout, training untouched: forwards through the pipeline, no more.

Held-out text and tasks are both scored here. Every data-parallel rank takes its share, the ranks of a last stage know
the outcome, and one all-reduce of three numbers a sequence tells all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_megatron.checkpoint import te_amaxes
from dsv3_megatron.data.source.samples import Sample, SampleSource, blank_batches, evaluation_batches
from dsv3_megatron.data.tasks.requests import Request
from dsv3_megatron.pipeline.model_stages import Batch
from dsv3_megatron.pipeline.parts import Parts
from dsv3_megatron.pipeline.scores import FIELDS
from dsv3_megatron.train.step import mean_loss, run_pipeline

GRAIN = 64  # requests are filled up to a multiple of so many tokens: kernels want even shapes, schedules few of them
MICROBATCHES = 4  # of a round of requests for each pipeline rank, 8 at least: a fifth of it at most is waiting
MOST_MICROBATCHES = 256  # that a rank reads and schedules at once, however many sequences are evaluated


@dataclass(frozen=True)
class Scores:
    """What the model makes of N sequences, the same on all ranks.

    Attributes:
        log_likelihoods: [N] float64, sum over the tokens that count, in nats.
        tokens: [N] float64, how many they are.
        greedy: [N] bool, whether each of them is the model's own choice.
    """

    log_likelihoods: np.ndarray
    tokens: np.ndarray
    greedy: np.ndarray

    @property
    def loss(self) -> float:
        """Nats a token, of all tokens together."""
        return float(-self.log_likelihoods.sum() / self.tokens.sum())

    def __getitem__(self, chosen: slice | np.ndarray) -> Scores:
        """Return the scores of some of the sequences."""
        return Scores(self.log_likelihoods[chosen], self.tokens[chosen], self.greedy[chosen])


def score(parts: Parts, source: SampleSource, count: int, micro_batch: int, length: int | None = None) -> Scores:
    """Return the scores of the first ``count`` sequences of a source, ``micro_batch`` at a time.

    ``length``: of all of them; None = as in training.
    """
    length = length or parts.recipe.data.sequence_length
    most = MOST_MICROBATCHES * micro_batch * parts.layout.dp
    runs = [(first, min(most, count - first)) for first in range(0, count, most)]
    found = np.concatenate([_score_run(parts, _From(source, first), many, micro_batch, length) for first, many in runs])
    likelihoods, tokens, misses = found.T
    return Scores(likelihoods, tokens, misses == 0)


def _score_run(parts: Parts, source: SampleSource, count: int, micro_batch: int, length: int) -> np.ndarray:
    """Return the scores [count, 3] of sequences that go through the pipeline in one run of a schedule."""
    batches = _batches(parts, source, count, micro_batch, length)
    found = torch.zeros(
        parts.layout.dp, len(batches), micro_batch, len(FIELDS), dtype=torch.float64, device=parts.device
    )
    _evaluate(parts, batches)
    if parts.groups.tp.rank() == 0:  # the others hold the same numbers
        for microbatch, scores in parts.stages.scores.items():
            found[parts.data_rank, microbatch] = scores
    parts.watchdog.enter("the scores of an evaluation")
    dist.all_reduce(found)
    parts.watchdog.leave()
    return found.flatten(0, 2)[:count].cpu().numpy()


class _From:
    """The sequences of a source from one on."""

    def __init__(self, source: SampleSource, first: int):
        self._source, self._first = source, first

    def sample(self, number: int) -> Sample:
        return self._source.sample(self._first + number)


def _batches(parts: Parts, source: SampleSource, count: int, micro_batch: int, length: int) -> list[Batch]:
    """Return this rank's microbatches; without text where its stages look at none."""
    if not parts.reads_samples:
        return blank_batches(-(-count // (parts.layout.dp * micro_batch)), micro_batch, length)
    return evaluation_batches(source, count=count, micro_batch=micro_batch, dp_rank=parts.data_rank, dp=parts.layout.dp)


def score_requests(
    parts: Parts, requests: Sequence[Request], go_on: Callable[[], bool] = lambda: True
) -> Scores | None:
    """Return the scores of requests, of each over the tokens that are scored.

    They are run by length, the longest first, in rounds as long as their longest: as many to a microbatch as have
    together the tokens of one of training's, so that a round needs no more memory than training does.

    Args:
        go_on: asked by all ranks together before every round; where it says no, the result is None.
    """
    found = np.zeros((len(requests), 3))
    by_length = sorted(range(len(requests)), key=lambda number: -requests[number].length)
    while by_length:
        if not go_on():
            return None
        length, micro_batch, most = _round(parts, requests[by_length[0]].length)
        chosen, by_length = by_length[:most], by_length[most:]
        filled = _FilledUp([requests[number] for number in chosen], length)
        scores = score(parts, filled, len(chosen), micro_batch, length)
        found[chosen] = np.stack([scores.log_likelihoods, scores.tokens, scores.greedy], axis=-1)
    return Scores(found[:, 0], found[:, 1], found[:, 2] > 0)


def _round(parts: Parts, longest: int) -> tuple[int, int, int]:
    """Return (length of its sequences, how many in a microbatch, how many on all ranks) of a round of requests."""
    layout, full = parts.layout, parts.recipe.data.sequence_length
    # Context parallelism cuts a sequence into two pieces a rank, tensor parallelism shares each of them out.
    grain = math.lcm(GRAIN, (2 * layout.cp if layout.cp > 1 else 1) * layout.tp)
    length = min(-(-longest // grain) * grain, full)
    micro_batch = parts.recipe.optim.micro_batch * (full // length)
    return length, micro_batch, micro_batch * layout.dp * max(8, MICROBATCHES * layout.pp)


class _FilledUp:
    """Requests as sequences of one length."""

    def __init__(self, requests: Sequence[Request], length: int):
        self._requests, self._length = requests, length

    def sample(self, number: int) -> Sample:
        return self._requests[number].sample(self._length)


def evaluate_batches(parts: Parts, batches: list[Batch]) -> float:
    """Return the next-token loss of batches (this data-parallel rank's), in nats per token over all ranks."""
    return mean_loss(parts, _evaluate(parts, batches))


@torch.no_grad()
def _evaluate(parts: Parts, batches: list[Batch]) -> Tensor:
    """Run the batches forward; return [loss sum, tokens] of this rank."""
    amaxes = parts.extra_states.get(te_amaxes.NAME)
    with _without_mtp(parts), amaxes.untouched() if isinstance(amaxes, te_amaxes.TeAmaxes) else nullcontext():
        total, _ = run_pipeline(parts, batches, training=False)
    return total


@contextmanager
def _without_mtp(parts: Parts) -> Iterator[None]:
    """Leave the MTP modules out for as long as the block lasts: they only serve training."""
    before = {stage: (c.config.mtp_num_layers, c.mtp_process) for stage, c in parts.chunks.items()}
    for chunk in parts.chunks.values():
        chunk.config.mtp_num_layers, chunk.mtp_process = None, False
    try:
        yield
    finally:
        for stage, chunk in parts.chunks.items():
            chunk.config.mtp_num_layers, chunk.mtp_process = before[stage]
