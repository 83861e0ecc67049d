"""The mixture of sources as a function of tokens: shares, exact, from the phases of a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from dsv3_megatron.data.settings import DataSettings, MixturePhase
from parallel.errors import DataError, RecipeError
from parallel.units import show_count

Shares = Mapping[str, Fraction]  # of every source that has one; together 1
LEAST = Fraction(1, 10**6)  # share of a source: its turns are looked for over the samples between two of them


@dataclass(frozen=True)
class MixturePiece:
    """A phase from ``start`` to ``end`` tokens (None: for ever); its shares move evenly from ``first`` to ``last``."""

    start: int
    end: int | None
    first: Shares
    last: Shares

    def shares(self, tokens: int) -> dict[str, Fraction]:
        """Return every source's share after ``tokens`` tokens, which lie in this phase."""
        part = Fraction(tokens - self.start, self.end - self.start) if self.end is not None else Fraction(0)
        return {
            name: self.first.get(name, Fraction(0)) * (1 - part) + self.last.get(name, Fraction(0)) * part
            for name in dict.fromkeys((*self.first, *self.last))
        }


@dataclass(frozen=True)
class MixtureCurve:
    """Phases that follow each other from 0 tokens on, the last of which never ends."""

    pieces: tuple[MixturePiece, ...]

    @classmethod
    def constant(cls, weights: Mapping[str, float], key: str = "data.weights") -> MixtureCurve:
        """Return the mixture that never changes. Raises RecipeError naming ``key``: a source has next to no weight."""
        shares = _shares(key, weights)
        return cls((MixturePiece(0, None, shares, shares),))

    @property
    def names(self) -> list[str]:
        """The sources, in the order in which the phases name them."""
        return list(dict.fromkeys(name for p in self.pieces for table in (p.first, p.last) for name in table))

    def __call__(self, tokens: int) -> dict[str, float]:
        """Return the share of each source in the sample that begins after ``tokens`` tokens."""
        piece = next(p for p in self.pieces if p.end is None or tokens < p.end)
        found = piece.shares(tokens)
        return {name: float(found.get(name, 0)) for name in self.names}


def mixture_of(settings: DataSettings, sources: Mapping[str, tuple[float | None, int]]) -> MixtureCurve:
    """Return the mixture of a recipe: its phases, else its weights, else the manifest's weights or sizes.

    ``sources``: name -> (weight in the manifest, sequences).
    Raises: DataError: a source that the recipe names is not among the sources. RecipeError: as :func:`build_mixture`.
    """
    given = mixture_of_recipe(settings)
    if given is None:
        sizes = {name: count if weight is None else weight for name, (weight, count) in sources.items()}
        return MixtureCurve.constant(sizes, key=f"{settings.path}/manifest.json")
    if unknown := [name for name in given.names if name not in sources]:
        key = "weights" if settings.mixture is None else "mixture"
        raise DataError(f"data.{key} names {unknown[0]}, but the sources are: {', '.join(sources)}")
    return given


def mixture_of_recipe(settings: DataSettings) -> MixtureCurve | None:
    """Return the mixture that a recipe names; None where the shards decide."""
    if settings.mixture is not None:
        return build_mixture(settings.mixture)
    return None if settings.weights is None else MixtureCurve.constant(settings.weights)


def build_mixture(phases: Sequence[MixturePhase]) -> MixtureCurve:
    """Return the curve of ``data.mixture``.

    Raises: RecipeError: a phase ends before it starts, moves without saying where to, counts in steps, or a source has
    no weight anywhere.
    """
    if not phases:
        raise RecipeError("data.mixture = [] has no phase; give it one at least, or null")
    pieces: list[MixturePiece] = []
    start, shares = 0, None
    for index, phase in enumerate(phases):
        here = f"data.mixture[{index}]"
        if phase.end <= start:
            raise RecipeError(
                f"{here}.until = {phase.until}, but the phase before it ends at {show_count(start)} tokens; "
                f"set it above {show_count(start)} or remove the phase"
            )
        first = shares if phase.at is None else _shares(f"{here}.at", phase.at)
        if first is None:
            raise RecipeError(f"{here}.at = null, but the first phase has no table to go on from; set {here}.at")
        if phase.shape == "constant" and phase.to is not None:
            raise RecipeError(f"{here}.to on a constant phase has no effect; use shape: linear, or at")
        if phase.shape == "linear" and phase.to is None:
            raise RecipeError(f"{here}.to = null on a linear phase; set the table it ends at")
        last = first if phase.to is None else _shares(f"{here}.to", phase.to)
        pieces.append(MixturePiece(start, phase.end, first, last))
        start, shares = phase.end, last
    assert shares is not None
    named = {name for phase in phases for table in (phase.at, phase.to) for name in table or ()}
    if idle := sorted(named - {name for piece in pieces for table in (piece.first, piece.last) for name in table}):
        raise RecipeError(f"data.mixture gives source {idle[0]} no weight in any phase; raise it or leave it out")
    return MixtureCurve((*pieces, MixturePiece(start, None, shares, shares)))


def _shares(key: str, weights: Mapping[str, float]) -> dict[str, Fraction]:
    """Return weights as shares of 1, each taken as the decimal that was written; those of 0 are left out."""
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    if not (whole := sum(exact.values())):
        raise RecipeError(f"{key} = {dict(weights)} gives no source any weight; give it to one at least")
    for name, weight in exact.items():
        if 0 < weight < whole * LEAST:
            raise RecipeError(
                f"{key}: the weight of source {name} is {float(weight / whole):.1e} of all; the least is "
                f"{float(LEAST):.0e}, so raise it or leave the source out"
            )
    return {name: weight / whole for name, weight in exact.items() if weight}
