"""What a run is evaluated on: some held-out sequences of every source, the same ones at every evaluation.

They come from all over a source, by a permutation of its sequences: the first ones of a packing are those of the
longest documents, and the first shards those of the first files. No seed of the run goes into that, so that runs with
different seeds are compared on the same text.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from dsv3_megatron.data.source.samples import Sample, SampleSource

SEED = 0  # of the permutations


@dataclass(frozen=True)
class HeldOutSource:
    """The held-out sequences of one source.

    Attributes:
        name: of the source.
        source: its sequences, permuted: the first ``n`` are a sample of all of them.
        sequences: how many there are.
    """

    name: str
    source: SampleSource
    sequences: int


class HeldOut:
    """The sequences that are evaluated, those of the first source first.

    Attributes:
        count: how many they are.
        ranges: source -> the numbers of its sequences.
    """

    def __init__(self, sources: Sequence[HeldOutSource], count: int):
        """Take ``count`` sequences in all, of each source by its share, but one at least (``apportioned``)."""
        self.sources = tuple(sources)
        ends = list(accumulate(apportioned(count, [source.sequences for source in self.sources])))
        self._starts = [0, *ends[:-1]]
        self.count = ends[-1]
        self.ranges = {source.name: range(*ends) for source, *ends in zip(self.sources, self._starts, ends)}

    def sample(self, number: int) -> Sample:
        """Return sequence ``number`` of those that are evaluated."""
        index = bisect_right(self._starts, number) - 1
        return self.sources[index].source.sample(number - self._starts[index])

    def of_at_most(self, count: int) -> HeldOut:
        """Return the same with fewer sequences."""
        return HeldOut(self.sources, min(count, self.count))


def apportioned(total: int, available: Sequence[int]) -> list[int]:
    """Return how many of ``total`` each source gets by what it has, largest remainders first: one at least, even where
    that makes more than ``total``, and no more than it has. Each has one or more."""
    assert total > 0 and min(available) > 0, (total, available)
    whole = sum(available)
    if total >= whole:
        return list(available)
    exact = [total * have / whole for have in available]
    found = [max(1, int(share)) for share in exact]
    by_surplus = sorted(range(len(available)), key=lambda i: (found[i] - exact[i], i))
    for index in by_surplus[: max(0, total - sum(found))]:
        found[index] += 1
    while sum(found) > total and max(found) > 1:  # those that were given their one took it from the others
        found[max((i for i in by_surplus if found[i] > 1), key=lambda i: found[i] - exact[i])] -= 1
    return found
