"""The messages of a schedule, and the one order in which every pair of ranks sends and receives them.

NCCL has no tags: the k-th message a rank sends to another meets the k-th receive that the other has posted for it, and
the two directions of a pair share one queue. All messages are therefore sorted once, by when the schedule produces
them (unit times), and a pair's queue is that order filtered. Both ends filter the same order, so they agree; and since
a message is never queued behind one that is produced later, no queue can close a circle of waiting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from parallel.pipeline.actions import Action, Schedule
from parallel.pipeline.simulator import unit_timeline


class MessageKey(NamedTuple):
    """Which message: known to the pass that makes it and to the one that needs it.

    Attributes:
        stage: the one that needs it.
    """

    payload: Literal["activation", "gradient"]
    stage: int
    microbatch: int

    @classmethod
    def needed_by(cls, part: Action) -> MessageKey:
        """Return what a forward, or a backward (B, I), needs of the stage before it, or after it."""
        return cls("activation" if part.kind == "F" else "gradient", part.stage, part.microbatch)

    @classmethod
    def made_by(cls, part: Action) -> MessageKey:
        """Return what a forward, or a backward (B, I), makes for the stage after it, or before it."""
        if part.kind == "F":
            return cls("activation", part.stage + 1, part.microbatch)
        return cls("gradient", part.stage - 1, part.microbatch)

    @property
    def maker(self) -> int:
        """The stage that makes it."""
        return self.stage - 1 if self.payload == "activation" else self.stage + 1

    def __str__(self) -> str:
        return f"{self.payload} of microbatch {self.microbatch} for stage {self.stage}"


@dataclass(frozen=True, slots=True)
class Message:
    """What the pass ``producer`` makes for the neighbouring stage: activations of a forward, else a gradient."""

    producer: Action
    source: int
    target: int

    @property
    def key(self) -> MessageKey:
        """Which message it is."""
        return MessageKey.made_by(self.producer)

    def __str__(self) -> str:
        return str(self.key)


Queue = tuple[Message, ...]


@dataclass(frozen=True)
class Transfers:
    """Per rank and peer, the messages between the two in the order in which this rank posts them."""

    queues: tuple[dict[int, Queue], ...]

    @classmethod
    def of(cls, schedule: Schedule) -> Transfers:
        """Return the messages of a schedule. Raises ScheduleError when its ranks wait for each other for ever."""
        timeline, place = unit_timeline(schedule), schedule.placement
        produced: list[tuple[float, int, int, Message]] = []
        for rank, steps in enumerate(schedule.ranks):
            for step, end in zip(steps, timeline.ends[rank]):
                for part in step.parts:
                    if part.kind == "W" or not 0 <= (key := MessageKey.made_by(part)).stage < schedule.stages:
                        continue
                    target = place.rank_of(key.stage, part.microbatch)
                    if target != rank:
                        produced.append((end, rank, len(produced), Message(part, rank, target)))
        queues: list[dict[int, list[Message]]] = [{} for _ in schedule.ranks]
        for *_, message in sorted(produced, key=lambda entry: entry[:3]):
            queues[message.source].setdefault(message.target, []).append(message)
            queues[message.target].setdefault(message.source, []).append(message)
        return cls(tuple({peer: tuple(queue) for peer, queue in of_rank.items()} for of_rank in queues))
