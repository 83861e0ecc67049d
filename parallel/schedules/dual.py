"""What DualPipe and DualPipeV share: eight phases, each a loop with its count computed.

Side 0 is the forward that enters at the rank's nearer end of the pipeline, side 1 the one that comes from the farther
end; ``near`` counts ranks from that nearer end (0 outermost), ``half`` is how many ranks the deepest side-0 path has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from parallel.pipeline.actions import Action, Overlap, Step, backward, forward, input_gradient, weight_gradient


class _Counters:
    """Hands out the next microbatch of each pass of each side, and remembers weight gradients deferred."""

    def __init__(self, pass_of: Callable[[int, int], tuple[int, int]]):
        self._pass_of = pass_of  # (side, number) -> (stage, microbatch)
        self._forwards = [0, 0]
        self._backwards = [0, 0]
        self._deferred: deque[tuple[int, int]] = deque()

    def f(self, side: int) -> Action:
        """Return the next forward of a side."""
        number = self._forwards[side]
        self._forwards[side] += 1
        return forward(*self._pass_of(side, number))

    def b(self, side: int, *, split: bool = False) -> Action:
        """Return the next backward of a side; ``split`` computes the input gradient and owes the other half."""
        where = self._pass_of(side, self._backwards[side])
        self._backwards[side] += 1
        if not split:
            return backward(*where)
        self._deferred.append(where)
        return input_gradient(*where)

    def w(self) -> Action:
        """Return the oldest weight gradient deferred."""
        return weight_gradient(*self._deferred.popleft())

    def fb(self, side_f: int, side_b: int) -> Overlap:
        """Return the next forward of one side overlapped with the next backward of the other."""
        return Overlap(self.f(side_f), self.b(side_b))


def dual_actions(near: int, half: int, per_side: int, pass_of: Callable[[int, int], tuple[int, int]]) -> Iterator[Step]:
    """Yield one rank's actions.

    Args:
        near: ranks between this one and its nearer end of the pipeline, 0 to half - 1.
        half: half the stages a microbatch passes (P/2 for DualPipe, P for DualPipeV).
        per_side: microbatches of each side.
        pass_of: (side, number of the microbatch on that side) -> (stage, microbatch).
    Source: the DualPipe repository's published order; arXiv 2412.19437 section 3.2.1.
    """
    do = _Counters(pass_of)
    inner = half - near - 1  # ranks between this one and the middle
    middle = inner == 0
    # 1: side 0 fills the pipeline
    for _ in range(2 * inner):
        yield do.f(0)
    # 2: the other side arrives
    for _ in range(near + 1):
        yield do.f(0)
        yield do.f(1)
    # 3: first backwards, split: others wait for the input gradient
    for _ in range(inner):
        yield do.b(1, split=True)
        yield do.w()
        yield do.f(1)
    # 4: the steady state: every forward overlapped with a backward of the other side
    for i in range(per_side - 2 * half + near + 1):
        if i == 0 and middle:  # not overlapped in the middle, whose backward the neighbours wait for
            yield do.f(0)
            yield do.b(1)
        else:
            yield do.fb(0, 1)
        yield do.fb(1, 0)
    # 5: side 0 has no forward left
    for _ in range(inner):
        yield do.b(1)
        yield do.fb(1, 0)
    # 6: only backwards; the later half leave their weight gradients for the drain
    split = False
    for i in range(near + 1):
        split = split or (i == (near + 1) // 2 and near % 2 == 1)
        yield do.b(1, split=split)
        split = split or (i == (near + 1) // 2 and near % 2 == 0)
        yield do.b(0, split=split)
    # 7: weight gradients fill the gaps between the last input gradients
    for _ in range(inner):
        yield do.w()
        yield do.b(0, split=True)
    # 8: the weight gradients left
    for _ in range(near + 1):
        yield do.w()
