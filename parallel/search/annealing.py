"""Betters a schedule by small changes: swaps, moves, splits and merges of actions, kept when the step gets shorter.

Simulated annealing over the action lists themselves. A change that breaks a rule hangs the simulation, or exceeds the
memory bound, and is dropped; what comes out is proven by the validator like any other schedule.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

from parallel.errors import ScheduleError
from parallel.pipeline.actions import (
    Action,
    Overlap,
    Schedule,
    Step,
    backward,
    input_gradient,
    peak_live,
    weight_gradient,
)
from parallel.pipeline.simulator import Times, simulate

_REACH = 8  # positions an action is moved at most in one change
_HOT = 3e-4  # warmth at the start, as a share of the makespan: more walks away from a good start and never comes back


def anneal(schedule: Schedule, times: Times, cap: int, *, evaluations: int, seed: int) -> Schedule:
    """Return the shortest schedule found, at worst the one given.

    Args:
        schedule: where to start; valid.
        times: of every stage.
        cap: live (stage, microbatch) pairs a rank may hold.
        evaluations: simulations to spend.
        seed: same seed, same result.
    """
    chance = random.Random(seed)
    here, cost = schedule, _cost(schedule, times)
    best, best_cost = here, cost
    hot = _HOT * simulate(schedule, times).makespan
    for number in range(evaluations):
        rank = chance.randrange(len(here.ranks))
        changed = chance.choice(_CHANGES)(here.ranks[rank], chance)
        if changed is None or peak_live(changed) > cap:
            continue
        there = replace(here, ranks=(*here.ranks[:rank], tuple(changed), *here.ranks[rank + 1 :]))
        try:
            new = _cost(there, times)
        except ScheduleError:  # ranks wait for each other: the change broke the order
            continue
        warmth = hot * (1 - number / evaluations) ** 2
        if new <= cost or (warmth > 0 and chance.random() < math.exp((cost - new) / warmth)):
            here, cost = there, new
            if cost < best_cost:
                best, best_cost = here, cost
    return best


def _cost(schedule: Schedule, times: Times) -> float:
    """Return the makespan; of equal ones, ranks that finish early are better (a plateau gets a slope)."""
    ends = [ends[-1] for ends in simulate(schedule, times).ends]
    return max(ends) + 1e-3 * sum(ends) / len(ends)


def _swap(steps: tuple[Step, ...], chance: random.Random) -> list[Step]:
    changed, i = list(steps), chance.randrange(len(steps) - 1)
    changed[i], changed[i + 1] = changed[i + 1], changed[i]
    return changed


def _move(steps: tuple[Step, ...], chance: random.Random) -> list[Step]:
    changed, i = list(steps), chance.randrange(len(steps))
    step = changed.pop(i)
    changed.insert(max(0, min(len(changed), i + chance.randint(-_REACH, _REACH))), step)
    return changed


def _split(steps: tuple[Step, ...], chance: random.Random) -> list[Step] | None:
    """Turn a whole backward into an input gradient and a later weight gradient."""
    found = [i for i, step in enumerate(steps) if step.kind == "B"]
    if not found:
        return None
    changed, i = list(steps), chance.choice(found)
    (whole,) = changed[i].parts
    where = (whole.stage, whole.microbatch)
    changed[i] = input_gradient(*where)
    changed.insert(chance.randint(i + 1, min(len(changed), i + 1 + _REACH)), weight_gradient(*where))
    return changed


def _merge(steps: tuple[Step, ...], chance: random.Random) -> list[Step] | None:
    """Turn an input gradient and its weight gradient into a whole backward."""
    found = [i for i, step in enumerate(steps) if step.kind == "I"]
    if not found:
        return None
    changed, i = list(steps), chance.choice(found)
    (half,) = changed[i].parts
    where = (half.stage, half.microbatch)
    changed[i] = backward(*where)
    changed.remove(Action("W", *where))
    return changed


def _pair(steps: tuple[Step, ...], chance: random.Random) -> list[Step] | None:
    """Overlap a forward and a whole backward that stand side by side."""
    found = [i for i in range(len(steps) - 1) if {steps[i].kind, steps[i + 1].kind} == {"F", "B"}]
    if not found:
        return None
    changed, i = list(steps), chance.choice(found)
    (first,), (second,) = changed.pop(i).parts, changed.pop(i).parts
    changed.insert(i, Overlap(first, second) if first.kind == "F" else Overlap(second, first))
    return changed


def _part(steps: tuple[Step, ...], chance: random.Random) -> list[Step] | None:
    """Take an overlapped action apart."""
    found = [i for i, step in enumerate(steps) if step.kind == "FB"]
    if not found:
        return None
    changed, i = list(steps), chance.choice(found)
    both = list(changed[i].parts)
    chance.shuffle(both)
    changed[i : i + 1] = both
    return changed


_CHANGES: tuple[Callable[[tuple[Step, ...], random.Random], list[Step] | None], ...] = (
    _swap,
    _swap,
    _move,
    _move,
    _split,
    _merge,
    _pair,
    _part,
)
