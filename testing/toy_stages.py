"""Stages without a model: they check what reaches them, count what is live, and can take a while."""

import time

import torch

from parallel.pipeline.simulator import Times


class ToyStages:
    """Implements parallel.pipeline.engine.Stages. A message carries microbatch, stage it is for, and its kind."""

    def __init__(self, schedule, times=None, hang_at=None, hang_seconds=4.0):
        self.schedule, self.times = schedule, times or Times.of(schedule.stages)
        self.hang_at, self.hang_seconds = hang_at, hang_seconds
        self.scale = 0.0 if times is None else 1.0
        self.live, self.peak = set(), 0
        self.done, self.reduced = [], []

    def empty_message(self):
        return torch.full((4,), -1.0)

    def _message(self, kind, part, stage):
        return torch.tensor([float(kind), part.microbatch, stage, 7.0])

    def forward(self, task):
        self.run(task)

    def backward(self, task):
        self.run(task)

    def forward_backward(self, forward, backward):
        self.run(forward, backward)

    def run(self, *tasks):
        """Run one task, or a forward and a backward together."""
        parts = [task.action for task in tasks]
        if self.hang_at is not None and self.hang_at in map(str, parts):
            time.sleep(self.hang_seconds)
        for part, received, _ in tasks:
            if part.kind == "F":
                self.live.add((part.stage, part.microbatch))
            if part.stage == (0 if part.kind == "F" else self.schedule.stages - 1):
                assert received is None, (part, received)
            else:
                assert received.tolist() == [part.kind != "F", part.microbatch, part.stage, 7], (part, received)
        self.peak = max(self.peak, len(self.live))
        seconds = sum(map(self.times.of_pass, parts))
        time.sleep(seconds * self.scale * (self.times.overlap if len(parts) == 2 else 1.0))
        for part, _, emit in tasks:
            if part.kind == "F" and part.stage < self.schedule.stages - 1:
                emit(self._message(0, part, part.stage + 1))
            if part.kind != "F" and part.stage:
                emit(self._message(1, part, part.stage - 1))
            if part.kind == "B":
                self.live.remove((part.stage, part.microbatch))
        self.done += parts

    def weight_gradient(self, action):
        time.sleep(self.times.of_pass(action) * self.scale)
        self.live.remove((action.stage, action.microbatch))
        self.done.append(action)

    def start_reduction(self, stage):
        assert not any(where[0] == stage for where in self.live)
        self.reduced.append(stage)
