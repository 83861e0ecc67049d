"""What an exchange holds at most beside the optimizer's states: ``Exchange.run``, allocation by allocation. No torch.

Sent and received numbers of a round, its matrices whole, what Newton-Schulz makes on the way, and what of the rounds
before and after it is there at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsv3_megatron.optim.spread import Plan


@dataclass(frozen=True)
class Round:
    """Numbers that a rank has in its hands in a round.

    Attributes:
        sent, received: of what is orthogonalised, those that stay on the rank among them.
        filled: of the largest box that it sends.
        stacks: (matrices, rows, columns) of what it works on, a stack for every shape.
        given, taken: of the results.
    """

    sent: int
    received: int
    filled: int
    stacks: tuple[tuple[int, int, int], ...]
    given: int
    taken: int

    @property
    def whole(self) -> int:
        """Numbers of the matrices that it works on."""
        return sum(many * rows * columns for many, rows, columns in self.stacks)


def rounds_of(plan: Plan) -> list[list[Round]]:
    """Return the rounds of every rank."""
    ranks = range(len(plan.holdings))
    sent, received, given, taken, filled = ([[0] * len(plan.rounds) for _ in ranks] for _ in range(5))
    for rank, holding in enumerate(plan.holdings):
        for place, box in enumerate(holding.boxes):
            number, owner = plan.round_of[box.matrix], plan.owner[box.matrix]
            given[owner][number] += box.numbers
            taken[rank][number] += box.numbers
            if place not in holding.copies:
                sent[rank][number] += box.numbers
                received[owner][number] += box.numbers
                filled[rank][number] = max(filled[rank][number], box.numbers)
    stacks = _stacks(plan)
    return [
        [Round(*each) for each in zip(sent[r], received[r], filled[r], stacks[r], given[r], taken[r])] for r in ranks
    ]


def _stacks(plan: Plan) -> list[list[tuple[tuple[int, int, int], ...]]]:
    """Return the stacks of every rank and round; of one owner, like shapes lie together in a round."""
    found: list[list[tuple[tuple[int, int, int], ...]]] = [[() for _ in plan.rounds] for _ in plan.holdings]
    for number, names in enumerate(plan.rounds):
        for (owner, (rows, columns)), alike in groupby(names, key=lambda name: (plan.owner[name], plan.shapes[name])):
            found[owner][number] += ((len(list(alike)), rows, columns),)
    return found


def most_bytes(rounds: list[Round], *, steps: int, size: int, mixing: int, alone: bool) -> int:
    """Return the most bytes that a rank's exchange has at once.

    Args:
        steps: of Newton-Schulz.
        size: bytes of a number that travels.
        mixing: bytes of a number of a box while gradient and momentum are mixed for it.
        alone: a group of one, where nothing travels, and what is sent is what comes.
    """
    most = 0

    def coming(number: int, beside: int) -> int:
        """Count a round's gather, above so many bytes; return what of it stays until its matrices are whole."""
        nonlocal most
        if number == len(rounds):
            return 0
        now = rounds[number]
        sent, received = now.sent * size, 0 if alone else now.received * size
        most = max(most, beside + sent + max(received, now.filled * mixing))
        return sent + received

    arriving, returning, before = coming(0, 0), 0, 0  # before: matrices of the last round, and as many results
    for number, now in enumerate(rounds):
        whole = now.whole * size
        most = max(most, arriving + whole + 2 * before + returning)
        arriving = coming(number + 1, arriving + whole + before + returning)
        done = 0
        for many, rows, columns in now.stacks:
            short, numbers = min(rows, columns), many * rows * columns
            inside = (2 if steps > 1 else 1) * numbers + 2 * many * short * short
            most = max(most, arriving + whole + before + returning + (done + inside) * size)
            done += numbers
        leaving = (now.given + (0 if alone else now.taken)) * size
        most = max(most, arriving + 2 * whole + returning + leaving)
        returning, before = leaving, whole
    return most
