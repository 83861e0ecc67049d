"""How long Muon's update takes: Newton-Schulz on the owners, the exchange around it, and what is read and written.

As ``optim.exchange`` has it: the next round's matrices come, and the last round's results leave, while a round is
worked on; AdamW's parameters are updated while the first matrices come. Ranks of a group start every round together. No
torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsv3_megatron.planning.memory.ranks import bytes_of_number
from dsv3_megatron.planning.time.roofline import Device, Format
from dsv3_megatron.recipe import Recipe
from parallel.links import Fabric, Moved

if TYPE_CHECKING:
    from dsv3_megatron.optim.spread import Plan
    from dsv3_megatron.planning.update.muon import GroupUpdate, RankUpdate

# Read and written of a number by AdamW at the most: master, moments and gradient, and the weight.
ADAMW_BYTES = 34
GRADIENT = 4


@dataclass(frozen=True)
class MuonTime:
    """Seconds of an update, one after the other: what the compute stream does, and what it waits for.

    Attributes:
        work_seconds: Newton-Schulz, in every round of the rank that takes longest.
        waiting_seconds: exchange that nothing hides.
        memory_seconds: momentum, weights and copies, and AdamW's numbers, on the rank that has most.
        exchange_seconds: all of the exchange, were it alone.
        gathered, returned: what the rank that sends most sends towards owners, and of results.
    """

    work_seconds: float
    waiting_seconds: float
    memory_seconds: float
    exchange_seconds: float
    gathered: Moved
    returned: Moved

    @property
    def seconds(self) -> float:
        """The update."""
        return self.work_seconds + self.waiting_seconds + self.memory_seconds

    @property
    def sent_bytes(self) -> float:
        """All that the rank that sends most sends."""
        return sum(moved.intra_bytes + moved.inter_bytes for moved in (self.gathered, self.returned))

    def __add__(self, other: MuonTime) -> MuonTime:
        return MuonTime(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def muon_time(recipe: Recipe, update: RankUpdate, fabric: Fabric) -> MuonTime:
    """Return the time of an update. Dense parameters are updated before the experts."""
    dense, experts = (_Part(recipe, part, fabric, update.size).time() for part in update.parts)
    return dense + experts


def newton_schulz_seconds(device: Device, stacks: Sequence[tuple[int, int, int]], steps: int, form: Format) -> float:
    """Return the time of a rank's stacks, (matrices, rows, columns) each, as ``optim.newton_schulz`` multiplies."""
    size, seconds = 2 if form == "bf16" else 4, 0.0
    for many, rows, columns in stacks:
        short, long = sorted((rows, columns))
        step = device.product(short, short, long, form, groups=many)
        step += device.product(short, short, short, form, groups=many)
        step += device.product(short, long, short, form, groups=many)
        seconds += steps * step + device.memory(3 * size * many * rows * columns)  # the norm, and dividing by it
    return seconds


class _Part:
    """The update of one group of ranks."""

    def __init__(self, recipe: Recipe, part: GroupUpdate, fabric: Fabric, size: int):
        self.recipe, self.part, self.fabric, self.size = recipe, part, fabric, size
        self.device = Device(recipe.cluster)
        self.moment = bytes_of_number(recipe, moments=1) - bytes_of_number(recipe, moments=0)

    def time(self) -> MuonTime:
        """Return its time: two streams, of kernels and of the exchange, as one rank after the other would see them."""
        adamw = self.device.memory(ADAMW_BYTES * self.part.by_adamw)
        plan, most = self.part.group.plan, self.part.by_muon
        if plan is None:
            return MuonTime(0.0, 0.0, adamw, 0.0, Moved(), Moved())
        traffic = RoundTraffic(plan, self.part.group.members, self.fabric, self.size)
        rounds = range(len(plan.rounds))
        kernels = memory = work = waiting = 0.0

        def touch(nbytes: float) -> None:
            nonlocal kernels, memory
            seconds = self.device.memory(nbytes)
            kernels, memory = kernels + seconds, memory + seconds

        def wait_for(moment: float) -> None:
            nonlocal kernels, waiting
            waiting, kernels = waiting + max(moment - kernels, 0.0), max(moment, kernels)

        def largest(number: int, *names: str) -> int:
            return max(sum(getattr(ranks[number], name) for name in names) for ranks in self.part.rounds)

        wire = come = 0.0
        left: list[float] = []
        touch((GRADIENT + 2 * self.moment) * most)  # the momentum moves
        for number in rounds:
            if number == 0:
                touch((GRADIENT + self.moment + self.size) * largest(0, "sent"))
                wire = come = kernels + traffic.gather_seconds[0]
                touch(ADAMW_BYTES * self.part.by_adamw + 8 * most)  # and the decay of matrices
            wait_for(come)
            touch(2 * self.size * largest(number, "received"))
            if number + 1 in rounds:
                touch((GRADIENT + self.moment + self.size) * largest(number + 1, "sent"))
                wire = come = max(wire, kernels) + traffic.gather_seconds[number + 1]
            seconds = self._work(number)
            kernels, work = kernels + seconds, work + seconds
            touch(2 * self.size * largest(number, "given"))
            wire = max(wire, kernels) + traffic.return_seconds[number]
            left.append(wire)
            if number:
                wait_for(left[number - 1])
                touch((self.size + 8) * largest(number - 1, "taken"))
        wait_for(left[-1])
        touch((self.size + 8) * largest(rounds[-1], "taken"))
        if self.recipe.precision.parameters == "bf16":
            touch((4 + 2) * most)  # masters become weights
        return MuonTime(work, waiting, memory, sum(traffic.gather_seconds + traffic.return_seconds), *traffic.most())

    def _work(self, number: int) -> float:
        """Return the time of Newton-Schulz in a round, on the rank that takes longest."""
        steps, form = self.recipe.optim.muon.steps, "bf16" if self.size == 2 else "fp32"
        stacks = {ranks[number].stacks for ranks in self.part.rounds}
        return max(newton_schulz_seconds(self.device, each, steps, form) for each in stacks)  # type: ignore[arg-type]


class RoundTraffic:
    """What an exchange sends over which links, round by round."""

    def __init__(self, plan: Plan, members: Sequence[int], fabric: Fabric, size: int):
        self._fabric = fabric
        nodes = [member // fabric.gpus_per_node for member in members]
        ranks, rounds = range(len(members)), range(len(plan.rounds))
        # Of every rank and round: bytes out and in, inside the node and between nodes.
        self._gather = [[_Bytes() for _ in rounds] for _ in ranks]
        self._return = [[_Bytes() for _ in rounds] for _ in ranks]
        for rank, holding in enumerate(plan.holdings):
            for place, box in enumerate(holding.boxes):
                owner, number = plan.owner[box.matrix], plan.round_of[box.matrix]
                if owner == rank:
                    continue
                inside = nodes[owner] == nodes[rank]
                nbytes = box.numbers * size
                self._return[owner][number].leave(nbytes, inside)
                self._return[rank][number].come(nbytes, inside)
                if place not in holding.copies:
                    self._gather[rank][number].leave(nbytes, inside)
                    self._gather[owner][number].come(nbytes, inside)
        self.gather_seconds = [max(each[n].seconds(fabric) for each in self._gather) for n in rounds]
        self.return_seconds = [max(each[n].seconds(fabric) for each in self._return) for n in rounds]

    def most(self) -> tuple[Moved, Moved]:
        """Return what the rank that sends most sends to owners, and of results; seconds are those of all rounds."""

        def sent(each: list[_Bytes]) -> Moved:
            return Moved(sum(b.out[True] for b in each), sum(b.out[False] for b in each))

        both = [(sent(gather), sent(back)) for gather, back in zip(self._gather, self._return)]
        gathered, returned = max(both, key=lambda m: sum(x.intra_bytes + x.inter_bytes for x in m))
        return (
            gathered + Moved(seconds=sum(self.gather_seconds)),
            returned + Moved(seconds=sum(self.return_seconds)),
        )


class _Bytes:
    """Bytes of one rank in one all-to-all, out and in, by whether they stay inside the node."""

    def __init__(self) -> None:
        self.out, self.back = {True: 0, False: 0}, {True: 0, False: 0}

    def leave(self, nbytes: int, inside: bool) -> None:
        """Count what is sent."""
        self.out[inside] += nbytes

    def come(self, nbytes: int, inside: bool) -> None:
        """Count what comes."""
        self.back[inside] += nbytes

    def seconds(self, fabric: Fabric) -> float:
        """Return how long it takes: both ways and both classes of links at the same time."""
        links = {True: fabric.intra, False: fabric.inter}
        most = {inside: max(self.out[inside], self.back[inside]) for inside in links}
        return max((link.seconds(most[inside]) for inside, link in links.items() if most[inside]), default=0.0)
