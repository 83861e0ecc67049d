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

    def run(self, forward, activation, emit_activation, backward, gradient, emit_gradient):
        parts = [part for part in (forward, backward) if part is not None]
        if self.hang_at is not None and self.hang_at in map(str, parts):
            time.sleep(self.hang_seconds)
        if forward is not None:
            if forward.stage:
                assert activation.tolist() == [0, forward.microbatch, forward.stage, 7], (forward, activation)
            self.live.add((forward.stage, forward.microbatch))
        if backward is not None and backward.stage < self.schedule.stages - 1:
            assert gradient.tolist() == [1, backward.microbatch, backward.stage, 7], (backward, gradient)
        self.peak = max(self.peak, len(self.live))
        seconds = sum(map(self.times.of_pass, parts))
        time.sleep(seconds * self.scale * (self.times.overlap if len(parts) == 2 else 1.0))
        if forward is not None and forward.stage < self.schedule.stages - 1:
            emit_activation(self._message(0, forward, forward.stage + 1))
        if backward is not None:
            if backward.stage:
                emit_gradient(self._message(1, backward, backward.stage - 1))
            if backward.kind == "B":
                self.live.remove((backward.stage, backward.microbatch))
        self.done += parts

    def weight_gradient(self, action):
        time.sleep(self.times.of_pass(action) * self.scale)
        self.live.remove((action.stage, action.microbatch))
        self.done.append(action)

    def start_reduction(self, stage):
        assert not any(where[0] == stage for where in self.live)
        self.reduced.append(stage)
