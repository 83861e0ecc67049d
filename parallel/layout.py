"""Who holds what: the coordinates of every rank and the members of every group. Pure Python, no process started.

One grid is the single truth. Ranks of a pipeline stage are contiguous, so the pipeline axis is the outermost; inside
a stage the same ranks are read twice, once for dense parameters and once for experts:

    dense:    rank = ((pp * DP + dp) * CP + cp) * TP + tp
    experts:  rank = ((pp * EDP + edp) * EP + ep) * ETP + etp

which is megatron-core's order ``tp-cp-ep-dp-pp``. Every group is the set of ranks that agree on all axes but its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from parallel.errors import LayoutError
from parallel.settings import ParallelSettings

DENSE_AXES = ("pp", "dp", "cp", "tp")
EXPERT_AXES = ("pp", "expert_dp", "ep", "expert_tp")

# The axes that vary inside a group; all others are fixed.
GROUPS = {
    "tp": ("tp",),
    "cp": ("cp",),
    "dp": ("dp",),
    "pp": ("pp",),
    "dp_cp": ("dp", "cp"),
    "tp_cp": ("cp", "tp"),
    "ep": ("ep",),
    "expert_tp": ("expert_tp",),
    "expert_dp": ("expert_dp",),
    "tp_ep": ("ep", "expert_tp"),
    "stage": ("dp", "cp", "tp"),  # all that hold a dense parameter of a stage, or a part of it
    "expert_stage": ("expert_dp", "expert_tp"),  # all that hold the same experts of a stage, or parts of them
}
KEYS = {
    "tp": "parallel.tensor",
    "cp": "parallel.context",
    "pp": "parallel.pipeline",
    "ep": "parallel.expert",
    "expert_tp": "parallel.expert_tensor",
}

MOST_RANKS = 1_000_000  # whose groups can be listed
_MOST_TRIED = 100_000  # divisors: no degree of parallelism is larger


def nearest_divisors(number: int, wanted: int) -> str:
    """Return the two divisors of ``number`` nearest to ``wanted``, as text for an error message."""
    candidates = (*range(1, min(number, _MOST_TRIED) + 1), number)
    divisors = sorted({d for d in candidates if number % d == 0}, key=lambda d: (abs(d - wanted), d))
    return ", ".join(str(d) for d in sorted(divisors[:2]))


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism of a world of ranks, and every question about who is where."""

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    ep: int = 1
    expert_tp: int = 1
    expert_dp: int = 1

    @classmethod
    def of(cls, parallel: ParallelSettings, world_size: int) -> Layout:
        """Return the layout of ``world_size`` ranks; the data-parallel degrees are what remains.

        Raises: LayoutError: the degrees do not divide the world, or it is larger than any.
        """
        if world_size > MOST_RANKS:
            raise LayoutError(f"{str(world_size)[:40]} ranks are more than {MOST_RANKS:,}; start fewer")
        tp, cp, pp = parallel.tensor, parallel.context, parallel.pipeline
        ep, expert_tp = parallel.expert, parallel.expert_tensor
        for what, degrees in (
            ("dense", {"tp": tp, "cp": cp, "pp": pp}),
            ("expert", {"ep": ep, "expert_tp": expert_tp, "pp": pp}),
        ):
            size = 1
            for degree in degrees.values():
                size *= degree
            if world_size % size:
                product_of = " x ".join(f"{KEYS[axis]} = {degree}" for axis, degree in degrees.items() if degree > 1)
                many = -(-world_size // size) * size
                raise LayoutError(
                    f"{product_of} needs a multiple of {size} ranks for the {what} layers, but there "
                    f"{'is 1 rank' if world_size == 1 else f'are {world_size} ranks'}; "
                    f"start {many} (torchrun --nproc-per-node), or lower one of these degrees"
                )
        stage = world_size // pp
        return cls(tp, cp, stage // (tp * cp), pp, ep, expert_tp, stage // (ep * expert_tp))

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.tp * self.cp * self.dp * self.pp

    def _sizes(self, axes: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in axes)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return the coordinate of ``rank`` on every axis, dense and expert."""
        if not 0 <= rank < self.world_size:
            raise LayoutError(f"rank {rank} is not in a world of {self.world_size}; ranks count from 0")
        found = {}
        for axes in (DENSE_AXES, EXPERT_AXES):
            rest = rank
            for axis in reversed(axes):
                rest, found[axis] = divmod(rest, getattr(self, axis))
        return found

    def groups(self, name: str) -> list[tuple[int, ...]]:
        """Return all groups called ``name`` (a key of GROUPS); they partition the world."""
        inside = GROUPS[name]
        axes = EXPERT_AXES if set(inside) & set(EXPERT_AXES[1:]) else DENSE_AXES
        strides = {axis: _product(self._sizes(axes[i + 1 :])) for i, axis in enumerate(axes)}

        def offsets(over: tuple[str, ...]) -> list[int]:
            ranges = [range(0, getattr(self, a) * strides[a], strides[a]) for a in over]
            return [sum(steps) for steps in product(*ranges)]

        members = offsets(tuple(a for a in axes if a in inside))
        return [tuple(base + m for m in members) for base in offsets(tuple(a for a in axes if a not in inside))]

    def group(self, name: str, rank: int) -> tuple[int, ...]:
        """Return the members of the group called ``name`` that ``rank`` belongs to, in order."""
        return next(members for members in self.groups(name) if rank in members)

    def mirrored(self, members: tuple[int, ...]) -> tuple[int, ...]:
        """Return a group of one stage together with the same ranks of the mirrored stage, P - 1 - stage.

        Under DualPipe both hold the same two stages, so gradients are reduced over both.
        """
        stage = self.world_size // self.pp
        other = {(self.pp - 1 - rank // stage) * stage + rank % stage for rank in members}
        return tuple(sorted({*members, *other}))

    def describe(self) -> str:
        """Return the degrees in one line: ``PP 2 x DP 2 (EP 2, expert DP 1)``."""
        dense = [f"{axis.upper()} {getattr(self, axis)}" for axis in DENSE_AXES if getattr(self, axis) > 1]
        expert = f"EP {self.ep}" + (f", expert TP {self.expert_tp}" if self.expert_tp > 1 else "")
        return f"{' x '.join(dense) or 'no split'} ({expert}, expert DP {self.expert_dp})"


def _product(numbers: tuple[int, ...]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result
