"""Schedules by a rule instead of a formula: whenever a rank is free, it does the best action that is ready.

What "best" means is a :class:`Rule`. With weight gradients apart the rule *gradients first, then forwards, weight
gradients when there is nothing else* is a bidirectional zero-bubble schedule; with pairing it is DualPipe in spirit.
Unlike the generators it takes unequal stages, any number of microbatches and any memory bound.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from parallel.pipeline.actions import (
    Action,
    Overlap,
    Placement,
    Schedule,
    Step,
    backward,
    forward,
    input_gradient,
    weight_gradient,
)
from parallel.pipeline.simulator import Times


@dataclass(frozen=True)
class Rule:
    """What a free rank prefers.

    ``pair``: overlap a forward with a backward where both are ready. ``split``: compute weight gradients apart.
    ``forwards_first``: fill the pipeline before draining it, as far as memory allows. ``bounded``: hold no more
    microbatches of a stage than 1F1B does (as many as stages are left to the loss). Over all stages of a rank that is
    what the known schedules hold, and no direction can fill the memory that another one needs to go on.
    """

    pair: bool
    split: bool
    forwards_first: bool = False
    bounded: bool = False

    @property
    def name(self) -> str:
        """A few words for reports."""
        words = ["paired"] if self.pair else []
        words.append("split" if self.split else "whole")
        words += ["eager"] * self.forwards_first + ["bounded"] * self.bounded
        return " ".join(words)


class _Rank:
    """One rank while the schedule grows: what it could do now, oldest microbatch of each stage first."""

    def __init__(self, cap: int, stages: tuple[int, ...], all_stages: int):
        self._cap, self._stages, self._all_stages = cap, stages, all_stages
        self._live = dict.fromkeys(stages, 0)  # microbatches held, by stage
        self.steps: list[Step] = []
        self.forwards: dict[int, deque[int]] = {}  # ready, by stage
        self.gradients: dict[int, deque[int]] = {}
        self.deferred: deque[tuple[int, int]] = deque()
        self.free_at = 0.0

    def choose(self, rule: Rule) -> Step | None:
        """Take the best action that is ready, or None."""
        # Forwards nearest to the loss first: their gradients are what others wait for.
        f = self._oldest(self.forwards, self._may_go_forward(rule)) if sum(self._live.values()) < self._cap else None
        b = self._oldest(self.gradients, self._stages)
        if rule.pair and f and b:
            return Overlap(self._forward(f), self._backward(b, split=False))
        if f and (rule.forwards_first or not b):
            return self._forward(f)
        if b:
            return self._backward(b, split=rule.split)
        if self.deferred:
            where = self.deferred.popleft()
            self._live[where[0]] -= 1
            return weight_gradient(*where)
        return None

    def _may_go_forward(self, rule: Rule) -> Iterator[int]:
        for stage in reversed(self._stages):
            if not rule.bounded or self._live[stage] < self._all_stages - stage:
                yield stage

    @staticmethod
    def _oldest(ready: dict[int, deque[int]], stages: Iterable[int]) -> tuple[int, int] | None:
        return next(((stage, ready[stage][0]) for stage in stages if ready.get(stage)), None)

    def _forward(self, where: tuple[int, int]) -> Action:
        self.forwards[where[0]].popleft()
        self._live[where[0]] += 1
        return forward(*where)

    def _backward(self, where: tuple[int, int], *, split: bool) -> Action:
        self.gradients[where[0]].popleft()
        if split:
            self.deferred.append(where)
            return input_gradient(*where)
        self._live[where[0]] -= 1
        return backward(*where)


def list_schedule(name: str, placement: Placement, times: Times, rule: Rule, cap: int) -> Schedule | None:
    """Return the schedule that the rule makes, or None where it runs into its own memory bound.

    Args:
        placement: where stages lie.
        times: of every stage; decides what is ready when.
        rule: what a free rank prefers.
        cap: live (stage, microbatch) pairs a rank may hold, weight gradients deferred included.
    """
    last, many = placement.stages - 1, placement.microbatches
    ranks = [_Rank(cap, placement.stages_of(number), placement.stages) for number in range(placement.ranks)]
    for microbatch in range(many):
        ranks[placement.rank_of(0, microbatch)].forwards.setdefault(0, deque()).append(microbatch)
    arrivals: list[tuple[float, int, int, str, int, int]] = []  # when, number, on which rank, F or B, stage, microbatch
    now, sent, left = 0.0, 0, 2 * many * placement.stages  # forwards and backwards still to do
    while left or any(rank.deferred for rank in ranks):
        for number, rank in enumerate(ranks):
            if rank.free_at > now or (step := rank.choose(rule)) is None:
                continue
            rank.steps.append(step)
            rank.free_at = now + times.duration(step)
            for part in (part for part in step.parts if part.kind != "W"):
                left -= 1
                ready = _makes_ready(part, last)
                if ready is None:
                    continue
                target = placement.rank_of(ready[1], part.microbatch)
                when = rank.free_at + (times.send if target != number else 0.0)
                sent += 1
                heapq.heappush(arrivals, (when, sent, target, *ready, part.microbatch))
        moments = [rank.free_at for rank in ranks if rank.free_at > now] + [entry[0] for entry in arrivals[:1]]
        if not moments:
            return None
        now = min(moments)
        while arrivals and arrivals[0][0] <= now:
            _, _, target, kind, stage, microbatch = heapq.heappop(arrivals)
            ready_there = ranks[target].forwards if kind == "F" else ranks[target].gradients
            ready_there.setdefault(stage, deque()).append(microbatch)
    return Schedule(name, placement, tuple(tuple(rank.steps) for rank in ranks))


def _makes_ready(part: Action, last: int) -> tuple[str, int] | None:
    """Return what a pass makes ready: (F or B, of which stage)."""
    if part.kind == "F":
        return ("B", last) if part.stage == last else ("F", part.stage + 1)
    return ("B", part.stage - 1) if part.stage else None
