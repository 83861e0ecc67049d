"""Whole matrices out of the boxes that ranks hold, and back: one all-to-all each way for every round of a plan.

While a rank works on the matrices of one round, those of the next are on their way to it and those of the last on their
way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_megatron.optim.spread import Box, Plan

Fill = Callable[[list[int], list[Tensor]], None]  # write the boxes at these places of mine into these views
Stack = tuple[list[str], Tensor]  # names of matrices of one shape, and they themselves: [B, n, m]


class Exchange:
    """What one rank of a group does of a plan."""

    def __init__(self, plan: Plan, group: dist.ProcessGroup, dtype: torch.dtype, device: torch.device):
        """Prepare. ``dtype``: of what travels, and of the matrices."""
        self.plan, self._group, self._dtype, self._device = plan, group, dtype, device
        self._rank, self._ranks = group.rank(), range(group.size())
        self.bytes_sent = self.bytes_received = 0  # since the start, to and from other ranks

    def run(
        self, fill: Fill, work: Callable[[Tensor], Tensor], take: Fill, beside: Callable[[], None] = lambda: None
    ) -> None:
        """Bring this step's matrices together, let their owners work on them, and give every holder its boxes back.

        Args:
            fill: writes this rank's boxes into what is sent.
            work: makes of a stack of matrices [B, n, m] another.
            take: reads this rank's boxes of the results.
            beside: done while the first matrices travel.
        """
        rounds = range(len(self.plan.rounds))
        coming = self._gather(0, fill) if rounds else None
        beside()
        going = None
        for number in rounds:
            assert coming is not None
            stacks = coming()
            coming = self._gather(number + 1, fill) if number + 1 in rounds else None
            results = [(names, work(stack)) for names, stack in stacks]
            returned = self._return(number, results)
            if going is not None:
                going(take)
            going = returned
        if going is not None:
            going(take)

    def _gather(self, number: int, fill: Fill) -> Callable[[], list[Stack]]:
        """Begin to bring a round's matrices to their owners; the result waits for this rank's and returns them."""
        plan, me = self.plan, self._rank
        outgoing = [plan.sent(me, owner, number) for owner in self._ranks]
        incoming = [plan.sent(holder, me, number) for holder in self._ranks]
        boxes = plan.holdings[me].boxes
        sent = self._empty(_numbers(boxes, places) for places in outgoing)
        mine = [place for places in outgoing for place in places]
        fill(mine, _cut(sent, [boxes[place] for place in mine]))
        received, wait = self._all_to_all(
            sent,
            [_numbers(boxes, places) for places in outgoing],
            [_numbers(plan.holdings[holder].boxes, places) for holder, places in enumerate(incoming)],
        )

        def finish() -> list[Stack]:
            wait()
            stacks = list(self._stacks(number))
            whole = {name: matrix for names, stack in stacks for name, matrix in zip(names, stack)}
            got = [plan.holdings[holder].boxes[place] for holder, places in enumerate(incoming) for place in places]
            _copy([_place(whole[box.matrix], box) for box in got], _cut(received, got))
            return stacks

        return finish

    def _return(self, number: int, results: Iterable[Stack]) -> Callable[[Fill], None]:
        """Begin to give the holders of a round's matrices their boxes of the results."""
        plan, me = self.plan, self._rank
        whole = {name: matrix for names, stack in results for name, matrix in zip(names, stack)}
        outgoing = [plan.taken(holder, me, number) for holder in self._ranks]
        incoming = [plan.taken(me, owner, number) for owner in self._ranks]
        given = [plan.holdings[holder].boxes[place] for holder, places in enumerate(outgoing) for place in places]
        sent = self._empty(box.numbers for box in given)
        _copy(_cut(sent, given), [_place(whole[box.matrix], box) for box in given])
        boxes = plan.holdings[me].boxes
        received, wait = self._all_to_all(
            sent,
            [_numbers(plan.holdings[holder].boxes, places) for holder, places in enumerate(outgoing)],
            [_numbers(boxes, places) for places in incoming],
        )
        mine = [place for places in incoming for place in places]

        def finish(take: Fill) -> None:
            wait()
            take(mine, _cut(received, [boxes[place] for place in mine]))

        return finish

    def _stacks(self, number: int) -> Iterator[Stack]:
        """Yield empty stacks for the matrices of a round that this rank owns, a stack for every shape."""
        names = [name for name in self.plan.rounds[number] if self.plan.owner[name] == self._rank]
        for shape, alike in groupby(names, key=self.plan.shapes.__getitem__):
            each = list(alike)
            yield each, torch.empty(len(each), *shape, dtype=self._dtype, device=self._device)

    def _all_to_all(self, sent: Tensor, out: Sequence[int], back: Sequence[int]) -> tuple[Tensor, Callable[[], object]]:
        """Begin to send ``out`` numbers to every rank, and to get ``back``; return what comes and what waits for it."""
        if len(self._ranks) == 1:
            return sent, lambda: None
        received = self._empty(back)
        work = dist.all_to_all_single(received, sent, list(back), list(out), group=self._group, async_op=True)
        self.bytes_sent += (sum(out) - out[self._rank]) * sent.element_size()
        self.bytes_received += (sum(back) - back[self._rank]) * sent.element_size()

        def wait(keep: Tensor = sent) -> None:  # what is sent must live until it has left
            work.wait()

        return received, wait

    def _empty(self, numbers: Iterable[int]) -> Tensor:
        return torch.empty(sum(numbers), dtype=self._dtype, device=self._device)


def _numbers(boxes: Sequence[Box], places: Iterable[int]) -> int:
    return sum(boxes[place].numbers for place in places)


def _cut(flat: Tensor, boxes: Sequence[Box]) -> list[Tensor]:
    """Return the boxes that lie one after the other in ``flat``, as views [rows, columns]."""
    return [part.view(box.rows, box.columns) for part, box in zip(flat.split([b.numbers for b in boxes]), boxes)]


def _place(matrix: Tensor, box: Box) -> Tensor:
    """Return where a box lies in its matrix."""
    return matrix[box.row : box.row + box.rows, box.column : box.column + box.columns]


def _copy(to: list[Tensor], of: list[Tensor]) -> None:
    if to:
        torch._foreach_copy_(to, of)
