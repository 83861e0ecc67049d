"""What a rank does, as data: actions, and a schedule as one list of them per rank.

An action is a forward (F), a whole backward (B), its halves - input gradient (I) and weight gradient (W) - of one
microbatch on one stage, or a forward of one microbatch overlapped with a backward of another (FB). The text form is
that of torch's pipeline schedules (``3F17`` is stage 3, forward, microbatch 17), so that the two compare line by line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, cast

Kind = Literal["F", "B", "I", "W", "FB"]
PassKind = Literal["F", "B", "I", "W"]
_SINGLE = re.compile(r"(\d+)([FBIW])(\d+)")
_PAIR = re.compile(r"\((\d+F\d+);(\d+B\d+)\)OVERLAP_F_B")


@dataclass(frozen=True, slots=True)
class Action:
    """One pass of one microbatch over one stage."""

    kind: PassKind
    stage: int
    microbatch: int

    @property
    def parts(self) -> tuple[Action, ...]:
        """The passes it consists of: itself."""
        return (self,)

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


@dataclass(frozen=True, slots=True)
class Overlap:
    """A forward and a backward run together, each hiding the other's communication (FB)."""

    forward: Action
    backward: Action

    @property
    def kind(self) -> Literal["FB"]:
        """What it is called in tables."""
        return "FB"

    @property
    def parts(self) -> tuple[Action, ...]:
        """The passes it consists of."""
        return (self.forward, self.backward)

    def __str__(self) -> str:
        return f"({self.forward};{self.backward})OVERLAP_F_B"


Step = Action | Overlap


def _single(found: re.Match[str]) -> Action:
    return Action(cast(PassKind, found[2]), int(found[1]), int(found[3]))


def parse(text: str) -> Step:
    """Return the action that a text form stands for. Raises ValueError when it stands for none."""
    text = text.strip()
    if found := _SINGLE.fullmatch(text):
        return _single(found)
    if found := _PAIR.fullmatch(text):
        forward, backward = _SINGLE.fullmatch(found[1]), _SINGLE.fullmatch(found[2])
        if forward and backward:
            return Overlap(_single(forward), _single(backward))
    raise ValueError(f"{text!r} is not an action; write 3F17, 0B2, 1I4, 1W4 or (3F17;0B2)OVERLAP_F_B")


@dataclass(frozen=True)
class Placement:
    """Which rank holds a stage for a microbatch, and which stages a rank holds.

    ``loop``: stage s on rank s mod P (one chunk per rank is the plain pipeline). ``v``: two stages a rank, r and
    2P - 1 - r. ``mirror``: every stage on two ranks, s and P - 1 - s; the first half of the microbatches runs down the
    ranks (direction 0), the second half up (direction 1).
    """

    kind: Literal["loop", "v", "mirror"]
    ranks: int
    stages: int
    microbatches: int

    @property
    def mirrored(self) -> bool:
        """Whether two ranks hold each stage."""
        return self.kind == "mirror" and self.ranks > 1

    def direction(self, microbatch: int) -> int:
        """Return 1 for a microbatch that enters at the last rank (mirror only), else 0."""
        return int(self.kind == "mirror" and microbatch >= self.microbatches // 2)

    def rank_of(self, stage: int, microbatch: int) -> int:
        """Return the rank that runs a stage for a microbatch."""
        if self.kind == "loop":
            return stage % self.ranks
        if self.kind == "v":
            return min(stage, 2 * self.ranks - 1 - stage)
        return self.ranks - 1 - stage if self.direction(microbatch) else stage

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Return the stages a rank holds, in ascending order."""
        if self.kind == "loop":
            return tuple(range(rank, self.stages, self.ranks))
        if self.kind == "v":
            return (rank, 2 * self.ranks - 1 - rank)
        return tuple(sorted({rank, self.ranks - 1 - rank}))


@dataclass(frozen=True)
class Schedule:
    """One list of actions per rank, and where stages lie. Engine, simulator, validator and drawing all read this."""

    name: str
    placement: Placement
    ranks: tuple[tuple[Step, ...], ...]

    @classmethod
    def from_ranks(cls, name: str, placement: Placement, actions: Callable[[int], Iterable[Step]]) -> Schedule:
        """Return the schedule whose rank r does ``actions(r)``."""
        return cls(name, placement, tuple(tuple(actions(rank)) for rank in range(placement.ranks)))

    @property
    def microbatches(self) -> int:
        """Microbatches of one step of one pipeline."""
        return self.placement.microbatches

    @property
    def stages(self) -> int:
        """Stages of the model."""
        return self.placement.stages

    @cached_property
    def kinds(self) -> frozenset[str]:
        """The kinds of its actions, on all ranks."""
        return frozenset(step.kind for steps in self.ranks for step in steps)

    @cached_property
    def peak_microbatches(self) -> tuple[int, ...]:
        """Per rank, how many (stage, microbatch) pairs are live at most.

        Live from its forward to the last of its gradients: a weight gradient still deferred keeps its microbatch's
        activations. Inside an overlapped action both of its microbatches are live.
        """
        return tuple(peak_live(steps) for steps in self.ranks)

    def text(self) -> str:
        """Return one line per rank; :meth:`parse_text` reads it back."""
        return "\n".join(",".join(map(str, steps)) for steps in self.ranks)

    @staticmethod
    def parse_text(name: str, placement: Placement, text: str) -> Schedule:
        """Return the schedule of a text form."""
        return Schedule(
            name, placement, tuple(tuple(parse(a) for a in line.split(",") if a) for line in text.split("\n"))
        )


def peak_live(steps: Iterable[Step]) -> int:
    """Return how many (stage, microbatch) pairs are live at most on a rank that does ``steps``."""
    live = peak = 0
    for step in steps:
        for part in step.parts:
            live += part.kind == "F"
            peak = max(peak, live)
            live -= part.kind in "BW"
    return peak


def forward(stage: int, microbatch: int) -> Action:
    """Return F."""
    return Action("F", stage, microbatch)


def backward(stage: int, microbatch: int) -> Action:
    """Return B, input and weight gradient at once."""
    return Action("B", stage, microbatch)


def input_gradient(stage: int, microbatch: int) -> Action:
    """Return I."""
    return Action("I", stage, microbatch)


def weight_gradient(stage: int, microbatch: int) -> Action:
    """Return W."""
    return Action("W", stage, microbatch)


def passes(steps: Iterable[Step]) -> Iterator[Action]:
    """Yield the passes of steps, overlapped ones taken apart."""
    for step in steps:
        yield from step.parts
