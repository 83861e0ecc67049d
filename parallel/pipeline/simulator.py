"""What a schedule takes: every action starts when its rank is free and what it needs has arrived.

The order of actions on a rank is the schedule's; nothing is reordered. Messages take ``send`` each and do not compete
for a link. The same run serves two purposes: with real times it prices a schedule, with unit times it gives the one
order of events that messages are sorted by (parallel.pipeline.transfers).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from parallel.errors import ScheduleError
from parallel.pipeline.actions import Action, Schedule, Step

LONGEST = 1e9  # of a time, and of a stage's cost: sums of millions stay exact enough to be drawn


@dataclass(frozen=True)
class Times:
    """How long actions take, stage by stage, in one unit (the user's: seconds, milliseconds, multiples of F).

    A whole backward takes ``input_grad + weight_grad``. An overlapped action of stages s and t takes
    ``overlap * (forward[s] + input_grad[t] + weight_grad[t])``; overlap below 1 is what hiding communication gains.
    Where ``pairs`` is given, it takes ``pairs[s][t]`` instead.
    """

    forward: tuple[float, ...]
    input_grad: tuple[float, ...]
    weight_grad: tuple[float, ...]
    overlap: float = 1.0
    send: float = 0.0
    pairs: tuple[tuple[float, ...], ...] | None = None

    @classmethod
    def of(
        cls,
        stages: int,
        *,
        forward: float = 1.0,
        input_grad: float = 1.0,
        weight_grad: float = 1.0,
        overlapped: float | None = None,
        send: float = 0.0,
        cost: Sequence[float] | None = None,
    ) -> Times:
        """Return times of ``stages`` stages, of which stage s costs ``cost[s]`` times a plain one (default 1 each).

        ``overlapped`` is what an overlapped action of two plain stages takes; None = the sum of its parts.
        Raises: ScheduleError: a time is negative or too long for arithmetic, all are 0, or ``cost`` has not one number
        per stage.
        """
        given = {"forward": forward, "input_grad": input_grad, "weight_grad": weight_grad, "send": send}
        for name, value in {**given, "overlapped": 0.0 if overlapped is None else overlapped}.items():
            if not 0 <= value <= LONGEST:
                raise ScheduleError(f"times.{name} = {value} is no duration; use a number from 0 to {LONGEST:g}")
        cost = tuple(cost) if cost is not None else (1.0,) * stages
        if len(cost) != stages or not all(0 <= c <= LONGEST for c in cost):
            shown = str(list(cost[:8]))
            raise ScheduleError(f"cost = {shown} must be {stages} numbers from 0 to {LONGEST:g}, one per stage")
        whole = forward + input_grad + weight_grad
        if not whole or not any(cost):
            raise ScheduleError("times: forward, input_grad and weight_grad are all 0; give one of them a duration")
        overlap = 1.0 if overlapped is None or not whole else overlapped / whole
        f, i, w = (tuple(value * c for c in cost) for value in (forward, input_grad, weight_grad))
        return cls(f, i, w, overlap, send)

    def of_pass(self, action: Action) -> float:
        """Return the duration of one pass run alone."""
        if action.kind == "F":
            return self.forward[action.stage]
        if action.kind == "I":
            return self.input_grad[action.stage]
        if action.kind == "W":
            return self.weight_grad[action.stage]
        return self.input_grad[action.stage] + self.weight_grad[action.stage]

    def duration(self, step: Step) -> float:
        """Return the duration of an action."""
        if step.kind == "FB" and self.pairs is not None:
            return self.pairs[step.forward.stage][step.backward.stage]
        alone = sum(map(self.of_pass, step.parts))
        return alone * self.overlap if step.kind == "FB" else alone


@dataclass(frozen=True)
class Timeline:
    """When every action of a schedule starts and ends, in the unit of its Times."""

    schedule: Schedule
    starts: tuple[tuple[float, ...], ...]
    ends: tuple[tuple[float, ...], ...]

    @property
    def makespan(self) -> float:
        """When the last rank has finished."""
        return max(ends[-1] for ends in self.ends if ends)

    @property
    def bubble(self) -> tuple[float, ...]:
        """How long each rank is idle between the step's beginning and its end."""
        busy = (sum(e - s for s, e in zip(starts, ends)) for starts, ends in zip(self.starts, self.ends))
        return tuple(self.makespan - b for b in busy)

    @property
    def bubble_fraction(self) -> float:
        """Idle share of the step, mean over ranks."""
        return sum(self.bubble) / len(self.bubble) / self.makespan


def simulate(schedule: Schedule, times: Times) -> Timeline:
    """Return when every action runs. Raises ScheduleError when ranks wait for each other for ever."""
    return _run(schedule, times.duration, times.send)


def unit_timeline(schedule: Schedule) -> Timeline:
    """Return the timeline in which every action takes 1 and a message nothing: the schedule's own order of events."""
    return _run(schedule, lambda step: 1.0, 0.0)


def _run(schedule: Schedule, duration: Callable[[Step], float], send: float) -> Timeline:
    place, many = schedule.placement, schedule.microbatches
    total, last = schedule.stages * many, schedule.stages - 1
    # When the forward, and the input gradient, of (stage, microbatch) is done, at stage * many + microbatch; and where.
    forwards: list[float | None] = [None] * total
    gradients: list[float | None] = [None] * total
    starts: list[list[float]] = [[] for _ in schedule.ranks]
    ends: list[list[float]] = [[] for _ in schedule.ranks]
    sleepers: dict[tuple[bool, int], list[int]] = {}  # (a gradient?, index) -> ranks that wait for it
    ready = list(range(len(schedule.ranks)))

    def arrival(part: Action, rank: int) -> tuple[float, tuple[bool, int] | None]:
        """Return when what a pass needs is here, or what it still waits for."""
        at, latest = part.stage * many + part.microbatch, 0.0
        if part.kind == "F":
            needed = [(False, at - many)] if part.stage else []
        elif part.kind == "W":
            needed = [(True, at)]
        else:
            needed = [(False, at)] + ([(True, at + many)] if part.stage < last else [])
        for key in needed:
            done = (gradients if key[0] else forwards)[key[1]]
            if done is None:
                return 0.0, key
            away = place.rank_of(key[1] // many, part.microbatch) != rank
            latest = max(latest, done + send if away else done)
        return latest, None

    while ready:
        rank = ready.pop()
        steps = schedule.ranks[rank]
        while len(ends[rank]) < len(steps):
            step = steps[len(ends[rank])]
            start = ends[rank][-1] if ends[rank] else 0.0
            missing = None
            for part in step.parts:
                when, missing = arrival(part, rank)
                if missing is not None:
                    sleepers.setdefault(missing, []).append(rank)
                    break
                start = max(start, when)
            if missing is not None:
                break
            starts[rank].append(start)
            end = start + duration(step)
            ends[rank].append(end)
            for part in step.parts:
                if part.kind == "W":
                    continue
                key = (part.kind != "F", part.stage * many + part.microbatch)
                (gradients if key[0] else forwards)[key[1]] = end
                ready.extend(sleepers.pop(key, ()))
    stuck = [r for r, steps in enumerate(schedule.ranks) if len(ends[r]) < len(steps)]
    if stuck:
        what = ", ".join(f"rank {r} at {schedule.ranks[r][len(ends[r])]}" for r in stuck[:4])
        raise ScheduleError(f"{schedule.name}: ranks wait for each other for ever: {what}")
    return Timeline(schedule, tuple(map(tuple, starts)), tuple(map(tuple, ends)))
