"""Who orthogonalises which matrix, and which numbers travel for it. Arithmetic on shapes, without tensors.

Every rank of a group holds boxes of some matrices: its run of a parameter (ZeRO-1) of its share of a tensor (tensor
parallelism). One rank, the owner, gets a matrix whole, and gives every holder its boxes of the result back. Owners are
chosen for even work, which is known in advance, and among those for little traffic; rounds bound what an owner has in
memory at once. From the same holdings every rank, and the planner, computes the same plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from dsv3_megatron.optim.matrices import Matrix, Runs

# Numbers of the matrices that an owner works on at once, unless one alone is larger: 128 MiB in BF16.
ROUND = 1 << 26
# How much longer than an even share an owner may work to spare traffic.
SLACK = 0.05


class Box(NamedTuple):
    """A box of a matrix that a rank holds: its place in the matrix."""

    matrix: str
    row: int
    rows: int
    column: int
    columns: int

    @property
    def numbers(self) -> int:
        """How many numbers it has."""
        return self.rows * self.columns


class Piece(NamedTuple):
    """A box of a tensor [rows, columns] or [experts, rows, columns] that lies in a run of numbers, as checkpoints cut
    it: first corner and extent in the tensor; strides in the run, and where in it the box begins."""

    corner: tuple[int, ...]
    extent: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


class Held(NamedTuple):
    """A box with where its numbers lie in a run: strides of rows and columns, and the first number's place."""

    box: Box
    strides: tuple[int, int]
    offset: int


@dataclass(frozen=True)
class Holding:
    """What one rank holds of the matrices of its group.

    Attributes:
        boxes: in the order in which they travel.
        copies: those among them, by their place, that another rank holds as well and sends: this one only takes.
    """

    boxes: tuple[Box, ...]
    copies: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Plan:
    """What the ranks of a group do in a step.

    Attributes:
        shapes: of every matrix, by name.
        owner: of every matrix.
        rounds: the matrices of every round, owner after owner.
        holdings: of every rank.
    """

    shapes: Mapping[str, tuple[int, int]]
    owner: Mapping[str, int]
    rounds: tuple[tuple[str, ...], ...]
    holdings: tuple[Holding, ...]

    def taken(self, rank: int, owner: int, number: int) -> list[int]:
        """Return the places in a rank's boxes of what it takes from an owner in a round."""
        return self._places.get((rank, owner, number), [])

    def sent(self, rank: int, owner: int, number: int) -> list[int]:
        """Return the places in a rank's boxes of what it sends an owner in a round."""
        copies = self.holdings[rank].copies
        return [place for place in self.taken(rank, owner, number) if place not in copies]

    @cached_property
    def round_of(self) -> dict[str, int]:
        """The number of the round in which each matrix is worked on."""
        return {name: number for number, names in enumerate(self.rounds) for name in names}

    @cached_property
    def _places(self) -> dict[tuple[int, int, int], list[int]]:
        found: dict[tuple[int, int, int], list[int]] = {}
        for rank, holding in enumerate(self.holdings):
            for place, box in enumerate(holding.boxes):
                found.setdefault((rank, self.owner[box.matrix], self.round_of[box.matrix]), []).append(place)
        return found

    def work(self, steps: int) -> list[int]:
        """Return the floating-point operations of every rank in a step of ``steps`` Newton-Schulz steps."""
        total = [0] * len(self.holdings)
        for name, rank in self.owner.items():
            total[rank] += products(*self.shapes[name], steps)
        return total

    def traffic(self, rank: int) -> tuple[int, int]:
        """Return the numbers that a rank sends to others in a step, and those that it gets."""
        out = back = 0
        for other, holding in enumerate(self.holdings):
            for place, box in enumerate(holding.boxes):
                owner = self.owner[box.matrix]
                if owner == other or rank not in (owner, other):
                    continue
                up = 0 if place in holding.copies else box.numbers  # towards the owner
                down = box.numbers
                out += up if rank == other else down
                back += down if rank == other else up
        return out, back


def boxes_of(matrix: Matrix, piece: Piece) -> Iterator[Held]:
    """Yield what a piece of the matrix's tensor holds of it."""
    *stack, row, column = piece.corner
    *_, rows, columns = piece.extent
    if stack and not stack[0] <= (matrix.expert or 0) < stack[0] + piece.extent[0]:
        return
    offset = piece.offset + (((matrix.expert or 0) - stack[0]) * piece.strides[0] if stack else 0)
    down, across = piece.strides[-2:]
    for at_row, first_row, row_count in _common(matrix.rows, row, row + rows):
        for at_column, first_column, column_count in _common(matrix.columns, column, column + columns):
            start = offset + (first_row - row) * down + (first_column - column) * across
            yield Held(Box(matrix.name, at_row, row_count, at_column, column_count), (down, across), start)


def _common(runs: Runs, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield what [start, end) of a tensor's axis has in common with a matrix's runs of it: where that is in the matrix,
    where in the tensor, and how much."""
    before = 0
    for first, last in runs:
        low, high = max(first, start), min(last, end)
        if low < high:
            yield before + low - first, low, high - low
        before += last - first


def products(rows: int, columns: int, steps: int) -> int:
    """Return the floating-point operations of orthogonalising one matrix [rows, columns]."""
    short, long = sorted((rows, columns))
    return 2 * steps * (2 * short * short * long + short**3)


def make_plan(shapes: Mapping[str, tuple[int, int]], holdings: Sequence[Holding], limit: int = ROUND) -> Plan:
    """Return who owns which matrix, and when it is worked on.

    Args:
        shapes: of every matrix that a rank of the group holds something of, by name.
        holdings: of every rank.
        limit: numbers of the matrices that a rank owns in one round, at most.
    Raises: AssertionError: the boxes that ranks send do not make whole matrices.
    """
    held = _held(shapes, holdings)
    owner = _owners(shapes, held, len(holdings))
    owned: dict[int, list[str]] = {}
    for name, rank in owner.items():
        owned.setdefault(rank, []).append(name)
    rounds: list[list[str]] = []
    for rank in sorted(owned):
        for number, names in enumerate(_rounds_of(owned[rank], shapes, limit)):
            while len(rounds) <= number:
                rounds.append([])
            rounds[number] += names
    return Plan(shapes, owner, tuple(map(tuple, rounds)), tuple(holdings))


def _held(shapes: Mapping[str, tuple[int, int]], holdings: Sequence[Holding]) -> dict[str, dict[int, int]]:
    """Return how many numbers of every matrix each rank holds."""
    held: dict[str, dict[int, int]] = {name: {} for name in shapes}
    sent = dict.fromkeys(shapes, 0)
    for rank, holding in enumerate(holdings):
        for place, box in enumerate(holding.boxes):
            held[box.matrix][rank] = held[box.matrix].get(rank, 0) + box.numbers
            sent[box.matrix] += 0 if place in holding.copies else box.numbers
    torn = [name for name, (rows, columns) in shapes.items() if sent[name] != rows * columns]
    assert not torn, f"{len(torn)} matrices would not be whole, {torn[0]} for one"
    return held


def _owners(shapes: Mapping[str, tuple[int, int]], held: Mapping[str, Mapping[int, int]], ranks: int) -> dict[str, int]:
    """Return the owner of every matrix, the most work first: who holds most of it, unless that rank has its share of
    work already; then who has the least."""
    work = {name: products(*shape, steps=1) for name, shape in shapes.items()}
    order = sorted(shapes, key=lambda name: (-work[name], name))
    enough = (1 + SLACK) * max(sum(work.values()) / ranks, max(work.values(), default=0))
    load, owner = [0] * ranks, {}
    for name in order:
        rank = min(held[name], key=lambda r: (-held[name][r], load[r], r))
        if load[rank] + work[name] > enough:
            rank = min(range(ranks), key=lambda r: (load[r], -held[name].get(r, 0), r))
        load[rank] += work[name]
        owner[name] = rank
    return owner


def _rounds_of(names: Iterable[str], shapes: Mapping[str, tuple[int, int]], limit: int) -> Iterator[list[str]]:
    """Yield the matrices of one owner round by round, like shapes together: they are one product of stacks."""
    now: list[str] = []
    size = 0
    for name in sorted(names, key=lambda name: (shapes[name], name)):
        rows, columns = shapes[name]
        if now and size + rows * columns > limit:
            yield now
            now, size = [], 0
        now.append(name)
        size += rows * columns
    if now:
        yield now
