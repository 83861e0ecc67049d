"""Proof that a schedule trains what it should and cannot hang, or one error that names the guilty action.

Checked, in this order: every forward, input gradient and weight gradient of every (stage, microbatch) exactly once, on
the rank that holds the stage; on each rank a backward after its forward and a weight gradient after its input gradient;
both ends of every pair of ranks expect the same messages in the same order; and a dry run under NCCL's rules ends, in
which pairs connect first, messages are posted as the engine posts them, and one passes only after all earlier ones of
its pair.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import cache, partial

from parallel.errors import ScheduleError
from parallel.pipeline.actions import Action, Schedule
from parallel.pipeline.connections import connection_order
from parallel.pipeline.posting import Cursor, reductions
from parallel.pipeline.transfers import Message, MessageKey, Transfers

Connections = tuple[tuple[int, ...], ...]  # per rank, the peers it connects with before the first step, in order


def validate(
    schedule: Schedule,
    transfers: Transfers | None = None,
    connections: Connections | None = None,
    *,
    groups_connected: bool = True,
    evaluates: bool = False,
) -> Transfers:
    """Return the messages of a schedule that is proven right. Raises ScheduleError when a rule is broken.

    Args:
        schedule: of training, or one of forwards only where it ``evaluates``.
        transfers: its messages; those of ``Transfers.of`` if None.
        connections: in which order ranks connect before the first step; the engine's (parallel.pipeline.connections) if
        None.
        groups_connected: whether the groups over which gradients are reduced have met before the first step
            (parallel.groups.connect_groups).
    """
    _check_completeness(schedule, evaluates)
    for rank in range(len(schedule.ranks)):
        _check_order_on_rank(schedule, rank)
    transfers = transfers or Transfers.of(schedule)
    _check_queues(schedule, transfers)
    connections = connection_order(schedule.placement) if connections is None else connections
    _DryRun(schedule, transfers, connections, groups_connected).run()
    return transfers


def _fail(schedule: Schedule, rank: int, position: int, why: str) -> ScheduleError:
    """Return the error with the guilty action shown among its neighbours."""
    steps = schedule.ranks[rank]
    around = [
        f"[{step}]" if i == position else str(step) for i, step in enumerate(steps) if position - 3 <= i <= position + 3
    ]
    return ScheduleError(f"{schedule.name}: rank {rank}, action {position}: {why}; there: {' '.join(around)}")


def _check_completeness(schedule: Schedule, evaluates: bool) -> None:
    place = schedule.placement
    seen: dict[tuple[str, int, int], tuple[int, int]] = {}
    for rank, steps in enumerate(schedule.ranks):
        for position, step in enumerate(steps):
            for part in step.parts:
                if not (0 <= part.stage < schedule.stages and 0 <= part.microbatch < schedule.microbatches):
                    raise _fail(schedule, rank, position, f"{part} is of no stage and microbatch of this schedule")
                holder = place.rank_of(part.stage, part.microbatch)
                if holder != rank:
                    raise _fail(schedule, rank, position, f"{part} belongs to rank {holder}")
                for kind in "IW" if part.kind == "B" else part.kind:
                    key = (kind, part.stage, part.microbatch)
                    if key in seen:
                        raise _fail(schedule, rank, position, f"{part} repeats what action {seen[key][1]} does")
                    seen[key] = (rank, position)
    names = {"F": "forward", "I": "input gradient", "W": "weight gradient"}
    for stage in range(schedule.stages):
        for microbatch in range(schedule.microbatches):
            for kind, name in list(names.items())[: 1 if evaluates else None]:
                if (kind, stage, microbatch) not in seen:
                    raise ScheduleError(f"{schedule.name}: nobody computes the {name} {stage}{kind}{microbatch}")


def _check_order_on_rank(schedule: Schedule, rank: int) -> None:
    done: set[tuple[str, int, int]] = set()
    for position, step in enumerate(schedule.ranks[rank]):
        for part in step.parts:
            before = {"B": "F", "I": "F", "W": "I"}.get(part.kind)
            if before and (before, part.stage, part.microbatch) not in done:
                raise _fail(schedule, rank, position, f"{part} comes before its {before}")
        done.update((k, p.stage, p.microbatch) for p in step.parts for k in ("IW" if p.kind == "B" else p.kind))


def _check_queues(schedule: Schedule, transfers: Transfers) -> None:
    for rank, queues in enumerate(transfers.queues):
        for peer, queue in queues.items():
            other = transfers.queues[peer].get(rank, ())
            for number, (mine, theirs) in enumerate(zip(queue, other)):
                if mine != theirs:
                    raise ScheduleError(
                        f"{schedule.name}: messages crossed: number {number} between ranks {rank} and {peer} is the "
                        f"{mine} for the first, but the {theirs} for the second"
                    )
            if len(queue) != len(other):
                raise ScheduleError(
                    f"{schedule.name}: ranks {rank} and {peer} expect {len(queue)} and {len(other)} messages"
                )


@dataclass(frozen=True)
class _Block:
    """Something a rank's host waits for, and how to say so."""

    over: Callable[[], bool]
    what: str


class _DryRun:
    """All ranks of a pipeline, each as far as it comes, under NCCL's rules and with hosts that never run ahead.

    What holds a rank:

    - a pair's first message, and the first one in each direction, until both ends post it
      (parallel.pipeline.connections);
    - a message it needs, until both ends have posted it and all earlier ones of the pair have passed;
    - the first reduction over a group that has not connected, which makes its communicator, until every holder of the
      stage starts it;
    - the end of the step, until what it sent has left.

    On a GPU the host stands at a message or at the step's end only where it reads a number; a run in which it always
    stands there ends in fewer cases, never in more.
    """

    def __init__(self, schedule: Schedule, transfers: Transfers, connections: Connections, groups_connected: bool):
        self._schedule, self._transfers, self._connections = schedule, transfers, connections
        self._groups_connected = groups_connected
        self._posted: dict[tuple[int, int], int] = {}  # (rank, peer) -> messages posted in their queue
        self._passed: set[Message] = set()
        self._heads: dict[tuple[int, int], int] = {}
        self._met: dict[Hashable, set[int]] = {}
        self.position = [0] * len(schedule.ranks)

    def run(self) -> None:
        """Raise ScheduleError if a rank does not come to its end."""
        hosts = [self._host(rank) for rank in range(len(self._schedule.ranks))]
        blocks: list[_Block | None] = [next(host, None) for host in hosts]
        moving = True
        while moving:
            moving = False
            for rank, host in enumerate(hosts):
                while (block := blocks[rank]) is not None and block.over():
                    blocks[rank], moving = next(host, None), True
        for rank, block in enumerate(blocks):
            if block is not None:
                raise _fail(self._schedule, rank, self.position[rank], f"waits for ever {block.what}")

    def _host(self, rank: int) -> Iterator[_Block]:
        """Yield, in order, what holds the host of a rank."""
        schedule, place = self._schedule, self._schedule.placement
        for peer in self._connections[rank] if self._connections else ():
            pair = frozenset((rank, peer))
            yield self._meeting(("connect", pair), rank, pair, f"to connect with rank {peer}")
        cursors = {peer: Cursor(queue, rank) for peer, queue in self._transfers.queues[rank].items()}
        reduce_after = {} if self._groups_connected else reductions(schedule, rank)
        for peer, cursor in cursors.items():
            yield from self._post(rank, peer, cursor.begin())
        for position, step in enumerate(schedule.ranks[rank]):
            self.position[rank] = position
            for part in step.parts:
                if part.kind != "W" and (key := MessageKey.needed_by(part)) in self._expected(rank):
                    message = self._expected(rank)[key]
                    cursor = cursors[message.source]
                    yield from self._post(rank, message.source, cursor.need(key))
                    yield _Block(partial(self._has_passed, message), f"for the {message} from rank {message.source}")
                    yield from self._post(rank, message.source, cursor.taken(key))
            for part in step.parts:
                if (made := self._made(rank).get(part)) is not None:
                    yield from self._post(rank, made.target, cursors[made.target].send(made.key))
            for stage in reduce_after.get(position, ()):
                holders = frozenset(r for r in range(place.ranks) if stage in place.stages_of(r))
                others = ", ".join(str(r) for r in sorted(holders - {rank}))
                yield self._meeting(("reduce", holders), rank, holders, f"to reduce stage {stage} with rank {others}")
        for message in self._made(rank).values():
            yield _Block(partial(self._has_passed, message), f"for rank {message.target} to take the {message}")

    def _post(self, rank: int, peer: int, messages: Iterator[Message]) -> Iterator[_Block]:
        connected = bool(self._connections) and peer in self._connections[rank]
        while True:
            try:
                message = next(messages)
            except StopIteration:
                return
            except LookupError as error:
                why = f"waits for ever, as messages to rank {peer} are out of order: {error}"
                raise _fail(self._schedule, rank, self.position[rank], why) from None
            self._posted[rank, peer] = self._posted.get((rank, peer), 0) + 1
            if not connected:
                pair = frozenset((rank, peer))
                what = f"with the first message between it and rank {peer}, the {message}, as they have not connected"
                yield self._meeting(("first", message.source, message.target), rank, pair, what)

    def _meeting(self, place: Hashable, rank: int, members: frozenset[int], what: str) -> _Block:
        """Return what is over when all members have come to ``place``."""
        came = self._met.setdefault(place, set())
        came.add(rank)
        return _Block(lambda: came >= members, what)

    def _has_passed(self, wanted: Message) -> bool:
        low, high = sorted((wanted.source, wanted.target))
        queue, posted = self._transfers.queues[low][high], self._posted
        at = self._heads.get((low, high), 0)
        while at < min(posted.get((low, high), 0), posted.get((high, low), 0)):
            self._passed.add(queue[at])
            at += 1
        self._heads[low, high] = at
        return wanted in self._passed

    @cache  # noqa: B019 - lives as long as this run
    def _expected(self, rank: int) -> dict[MessageKey, Message]:
        return {m.key: m for queue in self._transfers.queues[rank].values() for m in queue if m.target == rank}

    @cache  # noqa: B019
    def _made(self, rank: int) -> dict[Action, Message]:
        return {m.producer: m for queue in self._transfers.queues[rank].values() for m in queue if m.source == rank}
