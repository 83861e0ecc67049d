"""Proof that a schedule trains what it should and cannot hang, or one error that names the guilty action.

Checked, in this order: every forward, input gradient and weight gradient of every (stage, microbatch) exactly once, on
the rank that holds the stage; on each rank a backward after its forward and a weight gradient after its input gradient;
both ends of every pair of ranks expect the same messages in the same order; and a dry run under NCCL's rules, in which
a message passes only after all earlier ones of its pair, ends.
"""

from __future__ import annotations

from parallel.actions import Action, Schedule
from parallel.errors import ScheduleError
from parallel.transfers import Message, Transfers


def validate(schedule: Schedule, transfers: Transfers | None = None) -> Transfers:
    """Return the messages of a schedule that is proven right. Raises ScheduleError when a rule is broken."""
    _check_completeness(schedule)
    for rank in range(len(schedule.ranks)):
        _check_order_on_rank(schedule, rank)
    transfers = transfers or Transfers.of(schedule)
    _check_queues(schedule, transfers)
    _dry_run(schedule, transfers)
    return transfers


def _fail(schedule: Schedule, rank: int, position: int, why: str) -> ScheduleError:
    """Return the error with the guilty action shown among its neighbours."""
    steps = schedule.ranks[rank]
    around = [
        f"[{step}]" if i == position else str(step) for i, step in enumerate(steps) if position - 3 <= i <= position + 3
    ]
    return ScheduleError(f"{schedule.name}: rank {rank}, action {position}: {why}; there: {' '.join(around)}")


def _check_completeness(schedule: Schedule) -> None:
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
            for kind, name in names.items():
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


def _dry_run(schedule: Schedule, transfers: Transfers) -> None:
    """Run all ranks as far as they come; raise if that is not to the end."""
    expected = {
        rank: {(m.payload, m.stage, m.microbatch): m for queue in queues.values() for m in queue if m.target == rank}
        for rank, queues in enumerate(transfers.queues)
    }
    produced: set[Message] = set()
    arrived: set[Message] = set()
    heads = {(r, p): 0 for r, queues in enumerate(transfers.queues) for p in queues if r < p}
    position = [0] * len(schedule.ranks)
    by_producer = {(m.source, m.producer): m for qs in transfers.queues for q in qs.values() for m in q}

    def waits_for(rank: int) -> Message | None:
        for part in schedule.ranks[rank][position[rank]].parts:
            message = expected[rank].get(_input_of(part))
            if message is not None and message not in arrived:
                return message
        return None

    def deliver(pair: tuple[int, int]) -> bool:
        queue, moved = transfers.queues[pair[0]][pair[1]], False
        while heads[pair] < len(queue) and queue[heads[pair]] in produced:
            arrived.add(queue[heads[pair]])
            heads[pair] += 1
            moved = True
        return moved

    moving = True
    while moving:
        moving = False
        for rank, steps in enumerate(schedule.ranks):
            while position[rank] < len(steps) and waits_for(rank) is None:
                for part in steps[position[rank]].parts:
                    if (message := by_producer.get((rank, part))) is not None:
                        produced.add(message)
                position[rank] += 1
                moving = True
        for pair in heads:
            moving |= deliver(pair)
    for rank, steps in enumerate(schedule.ranks):
        if position[rank] < len(steps):
            message = waits_for(rank)
            why = f"waits for ever for the {message} from rank {message.source}"
            raise _fail(schedule, rank, position[rank], why)


def _input_of(part: Action) -> tuple[str, int, int] | None:
    """Return what a pass receives from another stage: (payload, stage, microbatch), as a message names it."""
    if part.kind == "W":
        return None
    return ("activation" if part.kind == "F" else "gradient", part.stage, part.microbatch)
