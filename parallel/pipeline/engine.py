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
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.device import has_streams
from parallel.pipeline.actions import Action, Schedule, Step
from parallel.pipeline.connections import connection_order
from parallel.pipeline.posting import Cursor, reductions
from parallel.pipeline.transfers import Message, MessageKey, Queue, Transfers
from parallel.pipeline.watchdog import Watchdog

Emit = Callable[[Tensor], None]
_CPU = torch.device("cpu")


class Stages(Protocol):
    """What this rank's stages compute."""

    def run(
        self,
        forward: Action | None,
        activation: Tensor | None,
        emit_activation: Emit,
        backward: Action | None,
        gradient: Tensor | None,
        emit_gradient: Emit,
    ) -> None:
        """Run a forward, a backward (B whole, I without weight gradients), or both overlapped.

        ``activation`` is the stage's input (None on the first stage), ``gradient`` that of its output (None on the
        last). What goes to the neighbouring stage is handed to ``emit_*`` as soon as it exists.
        """

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
        watchdog: Watchdog | None = None,
        device: torch.device = _CPU,
    ):
        """Take the schedule's list of this rank in ``group`` (the pipeline group: rank r there runs list r).

        ``device`` is where messages live.
        """
        self.rank = group.rank()
        self.steps = schedule.ranks[self.rank]
        self.waited_seconds = 0.0
        self._placement, self._last = schedule.placement, schedule.stages - 1
        self._stages, self._watchdog, self._device = stages, watchdog, device
        self._queues = Transfers.of(schedule).queues[self.rank]
        self._group = group
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
            if self._watchdog is not None:
                self._watchdog.begin(position, len(self.steps), step)
            self._execute(step)
            for stage in self._reduce_after.get(position, ()):
                self._stages.start_reduction(stage)
            if self._watchdog is not None:
                self._watchdog.launched()
        for peer, channel in self._channels.items():
            if self._watchdog is not None:
                self._watchdog.waits(f"last messages to pipeline rank {peer} to leave")
            channel.finish()
            if self._watchdog is not None:
                self._watchdog.runs()
        if self._watchdog is not None:
            self._watchdog.end()

    def _connect(self) -> None:
        """Exchange a number with every rank this one has messages for, so that no later call holds the host.

        One message each way: under NCCL the first makes the communicator of the two, and each direction has a transport
        of its own to connect (parallel.pipeline.connections).
        """
        number = torch.zeros(1, device=self._device)
        for peer in self._to_connect:
            if self._watchdog is not None:
                self._watchdog.enter(f"connecting with pipeline rank {peer}")
            other = dist.get_global_rank(self._group, peer)
            for exchange in (dist.send, dist.recv) if self.rank < peer else (dist.recv, dist.send):
                exchange(number, other, group=self._group)
        self._to_connect = ()

    def _execute(self, step: Step) -> None:
        if step.kind == "W":
            self._stages.weight_gradient(step)
            return
        forward = next((part for part in step.parts if part.kind == "F"), None)
        backward = next((part for part in step.parts if part.kind in "BI"), None)
        self._stages.run(
            forward,
            self._take("activation", forward) if forward and forward.stage > 0 else None,
            lambda tensor: self._emit("activation", forward, tensor),
            backward,
            self._take("gradient", backward) if backward and backward.stage < self._last else None,
            lambda tensor: self._emit("gradient", backward, tensor),
        )

    def _take(self, payload: str, part: Action) -> Tensor:
        """Return what another stage has made for ``part``, waiting for it if it comes from another rank.

        Its memory may belong to another stream than the one that uses it from here on: messages are posted, and
        overlapped forwards end, on the plan's communication stream. So it is recorded for the current one, and is not
        used for anything else before what runs here has read it.
        """
        tensor = self._await(payload, part)
        if has_streams(self._device):
            tensor.record_stream(torch.cuda.current_stream())
        return tensor

    def _await(self, payload: str, part: Action) -> Tensor:
        before = part.stage - 1 if payload == "activation" else part.stage + 1
        source = self._placement.rank_of(before, part.microbatch)
        key = (payload, part.stage, part.microbatch)
        if source == self.rank:
            return self._here.pop(key)
        start = time.perf_counter()
        if self._watchdog is not None:
            self._watchdog.waits(f"{payload} of microbatch {part.microbatch} from pipeline rank {source}")
        tensor = self._channels[source].take(key)
        self.waited_seconds += time.perf_counter() - start
        if self._watchdog is not None:
            self._watchdog.runs()
        return tensor

    def _emit(self, payload: str, part: Action, tensor: Tensor) -> None:
        towards = part.stage + (1 if payload == "activation" else -1)
        target = self._placement.rank_of(towards, part.microbatch)
        if target == self.rank:
            self._here[(payload, towards, part.microbatch)] = tensor
        else:
            self._channels[target].put((payload, towards, part.microbatch), tensor)

    def empty_message(self) -> Tensor:
        """Return a tensor to receive into."""
        return self._stages.empty_message()

    @property
    def group(self) -> dist.ProcessGroup:
        """The pipeline group."""
        return self._group


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
                tensor = made.contiguous()
                self._sending.append((dist.isend(tensor, self._peer, group=group), tensor))
            else:
                tensor = self._engine.empty_message()
                self._received[message.key] = (dist.irecv(tensor, self._peer, group=group), tensor)

    def finish(self) -> None:
        """Wait until everything sent has left."""
        while self._sending:
            self._sending.popleft()[0].wait()
        assert self._cursor.finished, self._received.keys()
