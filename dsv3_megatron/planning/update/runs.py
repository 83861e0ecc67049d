"""Which numbers of its stages' parameters every rank updates under ZeRO-1, without building anything. No torch.

megatron-core (0.16.1, ``_ParamAndGradBuffer``, ``DistributedOptimizer``) lays the parameters of a stage out in a
buffer, the last first, each at a multiple of 64 numbers; cuts the buffer into buckets, of which there is one without
overlap, but for a shared embedding's; and gives each data-parallel rank an even part of every bucket.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import lcm
from typing import NamedTuple

from dsv3_megatron.planning.update.parameters import Parameter, stage_parameters
from dsv3_megatron.recipe import Recipe
from parallel.layout import Layout

_START, _BUCKET = 64, 128  # numbers: 128 and 256 bytes of 16-bit weights


class Run(NamedTuple):
    """The numbers [start, end), row-major, of a parameter as a rank holds it."""

    parameter: Parameter
    start: int
    end: int

    @property
    def numbers(self) -> int:
        """How many there are."""
        return self.end - self.start


def copies_of(recipe: Recipe) -> int:
    """Return how many ranks of a pipeline hold the same stages."""
    return 2 if recipe.placement().mirrored else 1


def buffers_of(recipe: Recipe, layers: tuple[int, ...], pipeline_rank: int, *, experts: bool) -> list[list[Parameter]]:
    """Return the parameters of every buffer of a pipeline rank, in the order in which its optimizer has them: stage
    after stage, and where Transformer Engine holds weights in FP8 alone, those in a buffer of their own."""
    place = recipe.placement()
    stages = place.stages_of(pipeline_rank)
    meet = {0, place.stages - 1} <= set(stages) and place.stages > 1
    fp8 = recipe.precision.fp8
    apart = fp8 is not None and fp8.hold_weights and recipe.backend != "torch"
    found: list[list[Parameter]] = []
    for stage in stages:
        buffers: dict[bool, list[Parameter]] = {}
        for parameter in stage_parameters(recipe, layers, stage, borrowed=meet):
            if parameter.of_experts == experts:
                buffers.setdefault(apart and parameter.in_fp8, []).append(parameter)
        found += buffers.values()
    return found


def runs_of(buffers: Iterable[Sequence[Parameter]], layout: Layout, ranks: int) -> list[list[Run]]:
    """Return what each of ``ranks`` data-parallel ranks updates: the runs that are not empty, in order."""
    found: list[list[Run]] = [[] for _ in range(ranks)]
    for parameters in buffers:
        cuts = cut(
            [parameter.numbers(layout) for parameter in parameters],
            [parameter.shared for parameter in parameters],
            ranks,
        )
        for parameter, runs in zip(parameters, cuts):
            for rank, start, end in runs:
                found[rank].append(Run(parameter, start, end))
    return found


def cut(sizes: Sequence[int], alone: Sequence[bool], ranks: int) -> list[list[tuple[int, int, int]]]:
    """Return who updates which numbers of the parameters of one buffer: of each (rank, start, end), no empty ones.

    Args:
        sizes: numbers of every parameter.
        alone: whether it has a bucket of its own.
        ranks: among which each bucket is divided.
    """
    starts, buckets = _laid_out(sizes, alone, ranks)
    found = []
    for start, size in zip(starts, sizes):
        first, last = next(bucket for bucket in buckets if bucket[0] <= start < bucket[1])
        found.append(list(_parts(start - first, size, (last - first) // ranks)))
    return found


def _laid_out(sizes: Sequence[int], alone: Sequence[bool], ranks: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Return where every parameter begins in the buffer, and where buckets begin and end."""
    starts = [0] * len(sizes)
    buckets: list[tuple[int, int]] = []
    at = first = 0
    for number in reversed(range(len(sizes))):
        at = _up(at, _START)
        if alone[number] and at > first:
            at = first = _closed(buckets, first, at, ranks)
        starts[number] = at
        at += sizes[number]
        if alone[number]:
            at = first = _closed(buckets, first, at, ranks)
    if at > first:
        _closed(buckets, first, at, ranks)
    return starts, buckets


def _closed(buckets: list[tuple[int, int]], first: int, last: int, ranks: int) -> int:
    """Add a bucket, padded so that it can be divided evenly; return its end."""
    buckets.append((first, _up(last, lcm(ranks, _BUCKET))))
    return buckets[-1][1]


def _parts(start: int, size: int, share: int) -> Iterator[tuple[int, int, int]]:
    """Yield (rank, start, end) of a parameter that begins at ``start`` of a bucket of which each rank has ``share``."""
    at = 0
    while at < size:
        rank = (start + at) // share
        end = min(size, (rank + 1) * share - start)
        yield rank, at, end
        at = end


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
