"""The training regime: what changes over a run, as a function of tokens consumed.

A curve is a list of phases (``optim.settings.Phase``) or a number. Everything is recomputed from the tokens consumed,
so a resumed run needs no hidden state. Phases counted in steps, as the paper counts the warmup, are turned into tokens
once, by following the batch curve step by step.
Source of the shipped values: arXiv 2412.19437 section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsv3_megatron.optim.settings import OptimSettings, Phase
from parallel.errors import RecipeError
from parallel.units import show_count

_MOST_STEPS = 1_000_000  # of a batch that changes


@dataclass(frozen=True)
class _Piece:
    """A phase with its ends known: tokens [start, end), values from ``first`` to ``last``."""

    start: int
    end: int
    shape: str
    first: float
    last: float

    def value(self, tokens: int) -> float:
        if self.shape == "constant":
            return self.first
        part = (tokens - self.start) / (self.end - self.start)
        if self.shape == "cosine":
            part = (1 - math.cos(math.pi * part)) / 2
        return self.first + (self.last - self.first) * part


@dataclass(frozen=True)
class Curve:
    """A value for every count of tokens consumed. After the last phase its final value stays."""

    pieces: tuple[_Piece, ...]
    final: float

    def __call__(self, tokens: int) -> float:
        for piece in self.pieces:
            if tokens < piece.end:
                return piece.value(tokens)
        return self.final


def build_curve(name: str, phases: float | Sequence[Phase], tokens_of_step: Callable[[int], int]) -> Curve:
    """Return the curve of a number or of phases.

    Args:
        name: the recipe key, for messages.
        phases: as in the recipe.
        tokens_of_step: tokens consumed when a step begins, for phases counted in steps.
    Raises: RecipeError: a phase ends before it starts, or moves without saying where to.
    """
    if not isinstance(phases, Sequence):
        return Curve((), float(phases))
    if not phases:
        raise RecipeError(f"{name} = [] has no phase; give a number, or at least one phase")
    pieces: list[_Piece] = []
    start, value = 0, 0.0
    for index, phase in enumerate(phases):
        here = f"{name}[{index}]"
        end = tokens_of_step(phase.end) if phase.in_steps else phase.end
        if end <= start:
            raise RecipeError(
                f"{here}.until = {phase.until}, but the phase before it ends at {show_count(start)} tokens; "
                f"set it above {show_count(start)} or remove the phase"
            )
        first = value if phase.at is None else phase.at
        if phase.shape == "constant":
            if phase.to is not None:
                raise RecipeError(f"{here}.to = {phase.to} on a constant phase; use shape: linear, or at: {phase.to}")
            if index == 0 and phase.at is None:
                raise RecipeError(f"{here}.at = null, but the first phase has no value to go on from; set {here}.at")
            last = first
        elif phase.to is None:
            raise RecipeError(f"{here}.to = null on a {phase.shape} phase; set the value it ends at")
        else:
            last = phase.to
        pieces.append(_Piece(start, end, phase.shape, first, last))
        start, value = end, last
    return Curve(tuple(pieces), value)


class Regime:
    """Every curve of a recipe. Values are those in force for the step that begins after ``tokens`` tokens."""

    def __init__(self, optim: OptimSettings, sequence_length: int):
        self.sequence_length = sequence_length
        self._multiple = optim.batch_multiple
        self._batch_is_fixed = isinstance(optim.global_batch, int)
        self._batch = build_curve("optim.global_batch", optim.global_batch, self._no_steps)
        if self._batch(0) < 1:
            raise RecipeError("optim.global_batch[0].at = null, but a ramp of the batch cannot start at 0; set at: N")
        self._ramp_end = 0 if self._batch_is_fixed else self._batch.pieces[-1].end  # the batch is one number from here
        self._known_steps = [0]
        self.learning_rate = build_curve("optim.learning_rate", optim.learning_rate, self.tokens_of_step)
        self.mtp_weight = build_curve("optim.mtp_weight", optim.mtp_weight, self.tokens_of_step)
        self.mtp_depth_decay = build_curve("optim.mtp_depth_decay", optim.mtp_depth_decay, self.tokens_of_step)
        self.bias_speed = build_curve("optim.bias_speed", optim.bias_speed, self.tokens_of_step)
        self.balance_weight = build_curve("optim.balance_weight", optim.balance_weight, self.tokens_of_step)

    def curves(self) -> dict[str, Curve]:
        """Return every curve by its key in the recipe's ``optim`` section."""
        names = ("learning_rate", "mtp_weight", "mtp_depth_decay", "bias_speed", "balance_weight")
        return {"global_batch": self._batch, **{name: getattr(self, name) for name in names}}

    @staticmethod
    def _no_steps(step: int) -> int:
        raise RecipeError(
            f"optim.global_batch has a phase until {step} steps, but it decides what a step is; use tokens"
        )

    def global_batch(self, tokens: int) -> int:
        """Return the sequences of the step that begins after ``tokens`` tokens."""
        batch = int(self._batch(tokens))
        return batch if self._batch_is_fixed else max(batch // self._multiple, 1) * self._multiple

    def tokens_of_step(self, step: int) -> int:
        """Return the tokens consumed when step ``step`` (from 0) begins.

        Raises: RecipeError: it is millions of steps into a ramp of the batch, which is followed step by step.
        """
        known = self._known_steps
        while len(known) <= step and known[-1] < self._ramp_end:
            known.append(known[-1] + self.global_batch(known[-1]) * self.sequence_length)
            if len(known) > _MOST_STEPS:
                raise RecipeError(
                    f"optim.global_batch takes more than {_MOST_STEPS:,} steps to reach its last phase; end the phases "
                    "before it sooner"
                )
        if step < len(known):
            return known[step]
        return known[-1] + (step - len(known) + 1) * self.global_batch(known[-1]) * self.sequence_length
