"""The messages of a schedule, and the one order in which every pair of ranks sends and receives them.

NCCL has no tags: the k-th message a rank sends to another meets the k-th receive that the other has posted for it, and
the two directions of a pair share one queue. All messages are therefore sorted once, by when the schedule produces
them (unit times), and a pair's queue is that order filtered. Both ends filter the same order, so they agree; and since
a message is never queued behind one that is produced later, no queue can close a circle of waiting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from parallel.pipeline.actions import Action, Schedule
from parallel.pipeline.simulator import unit_timeline

MessageKey = tuple[Literal["activation", "gradient"], int, int]  # payload, stage that consumes it, microbatch


@dataclass(frozen=True, slots=True)
class Message:
    """What the pass ``producer`` makes for the neighbouring stage: activations of a forward, else a gradient."""

    producer: Action
    source: int
    target: int

    @property
    def payload(self) -> Literal["activation", "gradient"]:
        """What it carries."""
        return "activation" if self.producer.kind == "F" else "gradient"

    @property
    def stage(self) -> int:
        """The stage that consumes it."""
        return self.producer.stage + (1 if self.payload == "activation" else -1)

    @property
    def microbatch(self) -> int:
        """The microbatch it belongs to."""
        return self.producer.microbatch

    @property
    def key(self) -> MessageKey:
        """What a pass knows of a message: (payload, stage that consumes it, microbatch)."""
        return (self.payload, self.stage, self.microbatch)

    @staticmethod
    def describe(key: MessageKey) -> str:
        """Return a message in words."""
        return f"{key[0]} of microbatch {key[2]} for stage {key[1]}"

    def __str__(self) -> str:
        return self.describe(self.key)


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
                    towards = part.stage + (1 if part.kind == "F" else -1)
                    if part.kind == "W" or not 0 <= towards < schedule.stages:
                        continue
                    target = place.rank_of(towards, part.microbatch)
                    if target != rank:
                        produced.append((end, rank, len(produced), Message(part, rank, target)))
        queues: list[dict[int, list[Message]]] = [{} for _ in schedule.ranks]
        for *_, message in sorted(produced, key=lambda entry: entry[:3]):
            queues[message.source].setdefault(message.target, []).append(message)
            queues[message.target].setdefault(message.source, []).append(message)
        return cls(tuple({peer: tuple(queue) for peer, queue in of_rank.items()} for of_rank in queues))
