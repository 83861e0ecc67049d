"""When a rank posts its messages: the rules that the engine follows and the validator replays.

A send is posted as soon as its tensor exists, after every receive that stands before it in the queue of the pair.
Receives are posted when they are needed, and up to ``AHEAD`` of them before that.
"""

from __future__ import annotations

from collections.abc import Iterator

from parallel.pipeline.actions import Schedule
from parallel.pipeline.simulator import unit_timeline
from parallel.pipeline.transfers import Message, MessageKey, Queue

# Receives posted to a peer and not used yet, when no send waits behind them: enough to hide a message, few buffers.
AHEAD = 2


class Cursor:
    """How far a rank has posted the queue of one pair in one step."""

    def __init__(self, queue: Queue, rank: int):
        """Stand before the first message of the queue of ``rank`` and a peer."""
        self._queue, self._rank, self._next = queue, rank, 0
        self._open: set[MessageKey] = set()  # receives posted and not taken

    def begin(self) -> Iterator[Message]:
        """Yield what to post before the first action."""
        yield from self._receives_ahead()

    def send(self, key: MessageKey) -> Iterator[Message]:
        """Yield what to post, in this order, now that the message ``key`` of this rank is made."""
        while (message := self._post(for_=key)).key != key:
            yield message
        yield message
        yield from self._receives_ahead()

    def need(self, key: MessageKey) -> Iterator[Message]:
        """Yield what to post before waiting for the message ``key`` of the peer."""
        while key not in self._open:
            yield self._post(for_=key)

    def taken(self, key: MessageKey) -> Iterator[Message]:
        """Yield what to post now that the message ``key`` has been taken."""
        self._open.remove(key)
        yield from self._receives_ahead()

    @property
    def finished(self) -> bool:
        """Whether all messages are posted and all receives taken."""
        return self._next == len(self._queue) and not self._open

    def _receives_ahead(self) -> Iterator[Message]:
        while (
            self._next < len(self._queue) and self._queue[self._next].source != self._rank and len(self._open) < AHEAD
        ):
            yield self._post()

    def _post(self, for_: MessageKey | None = None) -> Message:
        """Post the next message; ``for_``: the one it must be, or come before (None: one to receive, there it is)."""
        what = str(for_) if for_ else "next message to receive"
        if self._next == len(self._queue):
            raise LookupError(f"the queue ends before the {what}")
        message = self._queue[self._next]
        if message.source != self._rank:
            self._open.add(message.key)
        elif message.key != for_:
            raise LookupError(f"the {message}, not made yet, stands in the queue before the {what}")
        self._next += 1
        return message


def reductions(schedule: Schedule, rank: int) -> dict[int, list[int]]:
    """Return, by position in the rank's list, the stages whose gradients start to be reduced after that action.

    Ranks that hold the same stages reduce over the same group, so they must start in the same order although they
    finish in different ones: by when the last of them is done.
    """
    timeline = unit_timeline(schedule)
    done: dict[int, float] = {}
    here: dict[int, int] = {}
    for each, steps in enumerate(schedule.ranks):
        for position, step in enumerate(steps):
            for part in step.parts:
                if part.kind != "F":
                    done[part.stage] = max(done.get(part.stage, 0.0), timeline.ends[each][position])
                    if each == rank:
                        here[part.stage] = position
    after: dict[int, list[int]] = {}
    latest = 0
    for stage in sorted(here, key=lambda stage: (done[stage], stage)):
        latest = max(latest, here[stage])
        after.setdefault(latest, []).append(stage)
    return after
