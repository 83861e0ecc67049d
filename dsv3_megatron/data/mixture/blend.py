"""Several sources as one, by a mixture; and where each of them has been read to its end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

from dsv3_megatron.data.mixture.order import Mixture
from dsv3_megatron.data.source.indexed import Piece
from dsv3_megatron.data.source.samples import Sample, SampleSource
from parallel.units import show_count


class PackedSource(SampleSource, Protocol):
    """A supply of sequences that repeats itself after ``count`` of them."""

    count: int

    def pieces(self, number: int) -> list[Piece]:
        """Return the stretches of documents that sequence ``number`` is made of, in order."""


@dataclass(frozen=True)
class Epoch:
    """A source begins anew. ``epoch`` counts from 1; ``sample``: the first that is of this epoch."""

    source: str
    epoch: int
    sample: int


class Blend:
    """A mixture of sources: sample number n is the next one of the source whose turn it is."""

    def __init__(
        self,
        sources: Mapping[str, PackedSource],
        mixture: Mixture,
        at_source_end: Literal["repeat", "stop"] = "repeat",
    ):
        """Take the sources that the mixture names, and no other."""
        assert set(sources) == set(mixture.names), (list(sources), mixture.names)
        self._stops = at_source_end == "stop"
        self.names, self.mixture = mixture.names, mixture
        self.sources = [sources[name] for name in mixture.names]

    def locate(self, number: int) -> tuple[int, int]:
        """Return (source, number of the sample in it)."""
        return self.mixture.locate(number)

    def sample(self, number: int) -> Sample:
        """Return sample ``number`` of the mixture."""
        source, inner = self.locate(number)
        return self.sources[source].sample(inner)

    def pieces(self, number: int) -> tuple[str, list[Piece]]:
        """Return the source of sample ``number``, and the stretches of documents in it, without reading text."""
        source, inner = self.locate(number)
        return self.names[source], self.sources[source].pieces(inner)

    def excluded_tokens(self, numbers: Iterable[int]) -> int:
        """Return how many places of these samples are left empty for excluded documents."""
        return sum(piece.length for n in numbers for piece in self.pieces(n)[1] if piece.excluded)

    def epochs(self, first: int, stop: int) -> list[Epoch]:
        """Return where sources begin anew among samples ``first`` to ``stop``, in the order in which they do."""
        found = []
        both = zip(self.mixture.counts(first), self.mixture.counts(stop))
        for source, (before, after) in enumerate(both):
            count = self.sources[source].count
            for epoch in range(max(1, -(-before // count)), -(-after // count)):
                sample = self.mixture.number_of(source, epoch * count)
                assert sample is not None, "its number lies below the samples that are read"
                found.append(Epoch(self.names[source], epoch + 1, sample))
        return sorted(found, key=lambda epoch: epoch.sample)

    def samples_until_end(self, number: int) -> int | None:
        """Return how many samples from ``number`` on are left before one would be of a source's second epoch, where a
        run stops there; None: it does not, or never comes so far."""
        return max(0, self._end[1] - number) if self._stops and self._end else None

    def why_ended(self) -> str:
        """Return the reason of a run for which :meth:`samples_until_end` has left too little."""
        assert self._end is not None, "a run without an end has none"
        source, sample = self._end
        return f"source {self.names[source]} is read to its end after {sample:,} samples, and data.at_source_end = stop"

    @cached_property
    def _end(self) -> tuple[int, int] | None:
        """The source that is the first to come to its end, and the sample that would be of its second epoch."""
        ends = ((self.mixture.number_of(source, each.count), source) for source, each in enumerate(self.sources))
        first = min(((sample, source) for sample, source in ends if sample is not None), default=None)
        return None if first is None else (first[1], first[0])

    def told_epochs(self, samples: int, sequence_length: int) -> list[str]:
        """Return a line for each source that a run of so many samples reads more than once."""
        lines = []
        for source, (name, read) in enumerate(zip(self.names, self.mixture.counts(samples))):
            if read > (count := self.sources[source].count):
                second = self.mixture.number_of(source, count)
                assert second is not None, "it lies among the samples of the run"
                lines.append(
                    f"source {name} is read {read / count:,.1f} times: its second epoch begins after "
                    f"{show_count(second * sequence_length)} tokens"
                )
        return lines
