"""``parallel.schedule=auto``: the shortest schedule for given stage times under a memory bound.

Tried are the generators of the placement, every rule of list scheduling, and annealing from the best of them; the
shortest is proven by the validator and returned. It is never worse than the best generator, and the same for the same
inputs and seed on every machine, so that all ranks of a job find the same one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path

from parallel.errors import ScheduleError
from parallel.pipeline.actions import Placement, Schedule
from parallel.pipeline.simulator import Times, simulate
from parallel.pipeline.validate import validate
from parallel.schedules import PLACEMENTS, check_size, make_schedule
from parallel.search.annealing import anneal
from parallel.search.list_scheduling import Rule, list_schedule

VERSION = 1  # of what the search finds; part of the cache's key
_CACHED_BYTES = 1 << 26
_BUDGET = 6_000_000  # actions simulated while annealing: some ten seconds
RULES = tuple(Rule(*choice) for choice in product((False, True), repeat=3))


@dataclass(frozen=True)
class Found:
    """What a search found: the schedule, and the makespan of everything tried."""

    schedule: Schedule
    tried: tuple[tuple[str, float], ...]  # (what, makespan), shortest first


def memory_bound(placement: Placement) -> int:
    """Return how many (stage, microbatch) pairs the known schedules of a placement hold at most on a rank."""
    stages_per_rank = max(1, placement.stages // placement.ranks)
    return {"mirror": placement.ranks + 1, "v": 2 * placement.ranks + 1}.get(
        placement.kind, placement.ranks * stages_per_rank
    )


@lru_cache(maxsize=64)
def search(
    placement: Placement, times: Times, *, cap: int | None = None, evaluations: int | None = None, seed: int = 0
) -> Found:
    """Return the shortest schedule found.

    Args:
        placement: where stages lie.
        times: of every stage.
        cap: live (stage, microbatch) pairs a rank may hold; None = what the known schedules of the placement need.
        evaluations: simulations spent on annealing; None = some ten seconds, 0 = generators and rules only.
        seed: of the annealing.
    Raises: ScheduleError: nothing fits the memory bound.
    """
    check_size(placement.ranks, placement.microbatches, max(1, placement.stages // placement.ranks))
    cap = memory_bound(placement) if cap is None else cap
    candidates = [(name, s) for name, s in _candidates(placement, times, cap) if max(s.peak_microbatches) <= cap]
    if not candidates:
        raise ScheduleError(f"auto: no schedule over {placement} holds at most {cap} microbatches a rank; raise it")
    timed = sorted(((simulate(s, times).makespan, name, s) for name, s in candidates), key=lambda entry: entry[:2])
    best = timed[0][2]
    if evaluations is None:
        evaluations = _BUDGET // sum(map(len, best.ranks))
    if evaluations:
        better = anneal(best, times, cap, evaluations=evaluations, seed=seed)
        timed.append((simulate(better, times).makespan, f"annealed from {timed[0][1]}", better))
        timed.sort(key=lambda entry: entry[0])
    chosen = Schedule("auto", placement, timed[0][2].ranks)
    validate(chosen)
    return Found(chosen, tuple((name, makespan) for makespan, name, _ in timed))


def _candidates(placement: Placement, times: Times, cap: int) -> list[tuple[str, Schedule]]:
    found = []
    for name, kind in PLACEMENTS.items():
        chunks = placement.stages // placement.ranks if name == "interleaved" else 1
        if kind != placement.kind or (kind == "loop" and name != "interleaved" and placement.stages > placement.ranks):
            continue
        try:
            found.append((name, make_schedule(name, placement.ranks, placement.microbatches, chunks)))
        except ScheduleError:  # not of these numbers
            continue
    found += _by_rules(RULES, placement, times, cap)
    # A rule that takes what is ready may fill the memory with one direction; with bounds it cannot.
    return found or _by_rules([replace(rule, bounded=True) for rule in RULES], placement, times, cap)


def _by_rules(rules: Sequence[Rule], placement: Placement, times: Times, cap: int) -> list[tuple[str, Schedule]]:
    made = [(rule.name, list_schedule(rule.name, placement, times, rule, cap)) for rule in rules]
    return [(name, schedule) for name, schedule in made if schedule is not None]


def cached_search(folder: str | Path, placement: Placement, times: Times, **options: int | None) -> Schedule:
    """Return what :func:`search` finds, from ``folder`` where an earlier search has left it."""
    key = hashlib.blake2b(repr((VERSION, placement, times, sorted(options.items()))).encode(), digest_size=12)
    path = Path(folder) / f"schedule-{key.hexdigest()}.txt"
    try:
        if not path.is_file() or path.stat().st_size > _CACHED_BYTES:  # no pipe, and no more than a schedule takes
            raise OSError
        schedule = Schedule.parse_text("auto", placement, path.read_text())
        validate(schedule)
        return schedule
    except (OSError, ValueError, ScheduleError):  # not there, or damaged: found anew
        schedule = search(placement, times, **options).schedule
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")
        beside.unlink(missing_ok=True)
        with beside.open("x") as file:  # never through a link
            file.write(schedule.text())
        os.replace(beside, path)
    except OSError:  # a cache that cannot be written costs the next start ten seconds
        pass
    return schedule
