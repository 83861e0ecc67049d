"""Runs a schedule on this rank: waits for what an action needs, runs it, sends what it made.

The engine knows actions, messages and ranks, and nothing of models: what a stage computes is behind :class:`Stages`.
Messages of a pair of ranks are posted in the order of parallel.pipeline.transfers. Receives are posted ahead of need,
sends as soon as their tensor exists, and nothing blocks before its result is needed. A stage's gradient reduction
starts when its last weight gradient is done, in an order that all ranks holding the stage share.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.device import has_streams
from parallel.pipeline.actions import Action, Schedule, Step
from parallel.pipeline.connections import connection_order
from parallel.pipeline.posting import Cursor, reductions
from parallel.pipeline.transfers import Message, MessageKey, Queue, Transfers
from parallel.pipeline.watchdog import NoWatchdog, Watchdog

_CPU = torch.device("cpu")


class Task(NamedTuple):
    """A forward or a backward for a stage to run.

    Attributes:
        action: F, B (whole) or I (without weight gradients).
        received: the stage's input for a forward, the gradient of its output for a backward; None where the model
            begins, or ends.
        emit: takes what the neighbouring stage needs, as soon as it exists; not called where the model ends, or begins.
    """

    action: Action
    received: Tensor | None
    emit: Callable[[Tensor], None]


class Stages(Protocol):
    """What this rank's stages compute."""

    def forward(self, task: Task) -> None:
        """Run F."""

    def backward(self, task: Task) -> None:
        """Run B, or I, which leaves the weight gradients to a W."""

    def forward_backward(self, forward: Task, backward: Task) -> None:
        """Run FB: both, each hiding the other's communication."""

    def weight_gradient(self, action: Action) -> None:
        """Run W."""

    def start_reduction(self, stage: int) -> None:
        """Start to reduce a stage's gradients over its data-parallel group; do not wait."""

    def empty_message(self) -> Tensor:
        """Return a tensor to receive an activation or a gradient into."""


class Engine:
    """One rank's share of one schedule. Made once, run every step."""

    def __init__(
        self,
        schedule: Schedule,
        group: dist.ProcessGroup,
        stages: Stages,
        watchdog: Watchdog | NoWatchdog | None = None,
        device: torch.device = _CPU,
    ):
        """Take the schedule's list of this rank in ``group`` (the pipeline group: rank r there runs list r).

        ``device`` is where messages live.
        """
        self.rank = group.rank()
        self.steps = schedule.ranks[self.rank]
        self.waited_seconds = 0.0
        self._placement, self._last = schedule.placement, schedule.stages - 1
        self.stages, self._watchdog, self._device = stages, watchdog or NoWatchdog(), device
        self._queues = Transfers.of(schedule).queues[self.rank]
        self.group = group
        self._reduce_after = reductions(schedule, self.rank)
        self._to_connect = connection_order(schedule.placement)[self.rank]
        self._channels: dict[int, _Channel] = {}

    def run(self) -> None:
        """Run all actions of one step. Gradient reductions may still be under way at the end."""
        self.waited_seconds = 0.0
        if self._to_connect:
            self._connect()
        self._channels = {peer: _Channel(peer, q, self) for peer, q in self._queues.items()}
        self._here: dict[MessageKey, Tensor] = {}
        for channel in self._channels.values():
            channel.begin()
        for position, step in enumerate(self.steps):
            self._watchdog.begin(position, len(self.steps), step)
            self._execute(step)
            for stage in self._reduce_after.get(position, ()):
                self.stages.start_reduction(stage)
            self._watchdog.launched()
        for peer, channel in self._channels.items():
            self._watchdog.waits(f"last messages to pipeline rank {peer} to leave")
            channel.finish()
            self._watchdog.runs()
        self._watchdog.end()

    def _connect(self) -> None:
        """Exchange a number with every rank this one has messages for, so that no later call holds the host.

        One message each way: under NCCL the first makes the communicator of the two, and each direction has a transport
        of its own to connect (parallel.pipeline.connections).
        """
        number = torch.zeros(1, device=self._device)
        for peer in self._to_connect:
            self._watchdog.enter(f"connecting with pipeline rank {peer}")
            other = dist.get_global_rank(self.group, peer)
            for exchange in (dist.send, dist.recv) if self.rank < peer else (dist.recv, dist.send):
                exchange(number, other, group=self.group)
        self._to_connect = ()

    def _execute(self, step: Step) -> None:
        match step.kind:
            case "F":
                self.stages.forward(self._task(step))
            case "B" | "I":
                self.stages.backward(self._task(step))
            case "FB":
                self.stages.forward_backward(self._task(step.forward), self._task(step.backward))
            case "W":
                self.stages.weight_gradient(step)

    def _task(self, action: Action) -> Task:
        """Return what a stage needs for a pass, as soon as it is here."""
        needed = MessageKey.needed_by(action)
        received = self._take(needed) if 0 <= needed.maker <= self._last else None
        return Task(action, received, partial(self._emit, MessageKey.made_by(action)))

    def _take(self, key: MessageKey) -> Tensor:
        """Return what another stage has made, waiting for it if it comes from another rank.

        Its memory may belong to another stream than the one that uses it from here on: messages are posted, and
        overlapped forwards end, on the plan's communication stream. So it is recorded for the current one, and is not
        used for anything else before what runs here has read it.
        """
        source = self._placement.rank_of(key.maker, key.microbatch)
        tensor = self._here.pop(key) if source == self.rank else self._receive(key, source)
        if has_streams(self._device):
            tensor.record_stream(torch.cuda.current_stream())
        return tensor

    def _receive(self, key: MessageKey, source: int) -> Tensor:
        start = time.perf_counter()
        self._watchdog.waits(f"{key.payload} of microbatch {key.microbatch} from pipeline rank {source}")
        tensor = self._channels[source].take(key)
        self.waited_seconds += time.perf_counter() - start
        self._watchdog.runs()
        return tensor

    def _emit(self, key: MessageKey, tensor: Tensor) -> None:
        target = self._placement.rank_of(key.stage, key.microbatch)
        if target == self.rank:
            self._here[key] = tensor
        else:
            self._channels[target].put(key, tensor)


class _Channel:
    """The messages between this rank and one peer, in their one order, in one step."""

    def __init__(self, peer: int, queue: Queue, engine: Engine):
        self._engine, self._cursor = engine, Cursor(queue, engine.rank)
        self._peer = dist.get_global_rank(engine.group, peer)
        self._received: dict[MessageKey, tuple[dist.Work, Tensor]] = {}  # posted and not taken yet
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()

    def begin(self) -> None:
        """Post the first receives."""
        self._post(self._cursor.begin())

    def put(self, key: MessageKey, tensor: Tensor) -> None:
        """Send a tensor."""
        self._post(self._cursor.send(key), tensor)
        while self._sending and self._sending[0][0].is_completed():  # gloo only tells after wait(): kept to the end
            self._sending.popleft()

    def take(self, key: MessageKey) -> Tensor:
        """Return a received tensor; waits for it."""
        self._post(self._cursor.need(key))
        work, tensor = self._received.pop(key)
        work.wait()
        self._post(self._cursor.taken(key))
        return tensor

    def _post(self, messages: Iterator[Message], made: Tensor | None = None) -> None:
        group = self._engine.group
        for message in messages:
            if message.source == self._engine.rank:
                assert made is not None, "a message is posted once it is made (posting.Cursor)"
                tensor = made.contiguous()
                work = dist.isend(tensor, self._peer, group=group)
                assert work is not None  # torch has none for a rank outside the group
                self._sending.append((work, tensor))
            else:
                tensor = self._engine.stages.empty_message()
                work = dist.irecv(tensor, self._peer, group=group)
                assert work is not None
                self._received[message.key] = (work, tensor)

    def finish(self) -> None:
        """Wait until everything sent has left."""
        while self._sending:
            self._sending.popleft()[0].wait()
        assert self._cursor.finished, self._received.keys()
