"""Several sources as one, by weight: which source sample number n comes from, without counting up to n."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dsv3_megatron.data.source.samples import Sample, SampleSource
from parallel.errors import DataError

CYCLE = 1 << 16  # samples after which the pattern of sources repeats; weights are kept to one part in so many


class Blend:
    """A mixture of sources.

    Every cycle of 65,536 samples has the same pattern, in which each source's turns are spread as evenly as they can
    be: any stretch of samples, a batch too, holds the sources in their weights to within one turn of each.
    """

    def __init__(self, sources: Sequence[SampleSource], weights: Sequence[float], names: Sequence[str]):
        self.sources = sources
        turns = _apportion(weights, names)
        when = np.concatenate([(np.arange(count) + 0.5) / count for count in turns])
        whose = np.repeat(np.arange(len(turns)), turns)
        self._source = whose[np.argsort(when, kind="stable")]
        self._turns = turns
        self._turn = np.empty(CYCLE, dtype=np.int64)  # how many turns of its source lie before, in the cycle
        for source in range(len(turns)):
            mine = self._source == source
            self._turn[mine] = np.arange(mine.sum())

    def locate(self, number: int) -> tuple[int, int]:
        """Return (source, number of the sample in it)."""
        cycle, place = divmod(number, CYCLE)
        source = int(self._source[place])
        return source, cycle * self._turns[source] + int(self._turn[place])

    def sample(self, number: int) -> Sample:
        """Return sample ``number`` of the mixture."""
        source, inner = self.locate(number)
        return self.sources[source].sample(inner)


def _apportion(weights: Sequence[float], names: Sequence[str]) -> list[int]:
    """Return turns in a cycle by weight, largest remainders first. Raises DataError for a source with none."""
    exact = np.asarray(weights, dtype=np.float64) / np.sum(weights) * CYCLE
    turns = np.floor(exact).astype(int)
    for source in np.argsort(turns - exact, kind="stable")[: CYCLE - turns.sum()]:
        turns[source] += 1
    if not turns.all():
        least = int(np.argmin(turns))
        raise DataError(
            f"weight of source {names[least]} is {exact[least] / CYCLE:.1e} of all; the least is {1 / CYCLE:.1e}, "
            "so raise it or leave the source out"
        )
    return turns.tolist()
