"""What a recipe on its cluster expects of failures: how often, what each costs, how often to save, what is left.

Everything follows from the recipe's keys and exact counts of bytes. Every failure is taken to be noticed as late as the
latest: when an action runs into ``run.abort_seconds``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import ceil, isfinite
from typing import Any

from dsv3_megatron.pipeline.split import layers_of_stages
from dsv3_megatron.planning.goodput.model import Save, best_intervals, useful_share
from dsv3_megatron.planning.goodput.stored import bytes_written
from dsv3_megatron.recipe import Recipe
from parallel.layout import Layout

DAY = 86400.0
# Of all failures, those after which every share is still whole in some node's memory: those of one node at a time. No
# published log tells these apart; an assumption.
MEMORY_SURVIVES = 0.95
# By rank: into memory, to another node, and compared with checksums. Measured on two busy cores over loopback, and so a
# lower bound for most nodes (benchmarks/results/memory_copies.json).
KEPT_GIGABYTES_PER_SECOND, SENT_GIGABYTES_PER_SECOND, COMPARED_GIGABYTES_PER_SECOND = 0.50, 0.41, 1.85


@dataclass(frozen=True)
class KindOfSave:
    """A kind of save, and how often there is one.

    Attributes:
        costs: of one save, and of going back to it.
        best_seconds: of training between two, at which most time is useful.
        planned_seconds: the same as the recipe has it; infinite: none before the end.
    """

    name: str
    costs: Save
    best_seconds: float
    planned_seconds: float


@dataclass(frozen=True)
class Goodput:
    """What is left of a run's time.

    Attributes:
        checkpoint_bytes, rank_bytes: of a save, of all ranks and of the one that writes most.
        assumptions: what the rest follows from, by key of the recipe; by its name where no key says it.
        saves: kinds of save, that of the shortest recovery first.
        share: of the time that is useful as the recipe saves.
        best_share: the same with the best intervals.
        step_seconds: of a step without saves.
    """

    failures_per_day: float
    checkpoint_bytes: int
    rank_bytes: int
    assumptions: dict[str, float]
    saves: tuple[KindOfSave, ...]
    share: float
    best_share: float
    step_seconds: float

    def as_json(self) -> dict[str, Any]:
        """Return what plan.json says; what is infinite as null."""
        return {
            "not_planned": None,
            "failures_per_day": self.failures_per_day,
            "checkpoint_bytes": self.checkpoint_bytes,
            "largest_rank_bytes": self.rank_bytes,
            "assumptions": self.assumptions,
            "saves": {
                kind.name: {
                    **asdict(kind.costs),
                    "best_interval_seconds": finite(kind.best_seconds),
                    "best_interval_steps": self.steps(kind.best_seconds),
                    "interval_seconds": finite(kind.planned_seconds),
                    "interval_steps": self.steps(kind.planned_seconds),
                }
                for kind in self.saves
            },
            "useful_share": self.share,
            "best_useful_share": self.best_share,
        }

    def steps(self, seconds: float) -> int | None:
        """Return the steps of an interval; None where it is infinite."""
        return steps_in(seconds, self.step_seconds) if isfinite(seconds) else None


def not_planned(why: str) -> dict[str, Any]:
    """Return what plan.json says where there is no prediction: every key all the same."""
    keys = ("failures_per_day", "checkpoint_bytes", "largest_rank_bytes", "assumptions", "saves", "useful_share")
    return {"not_planned": why, **dict.fromkeys((*keys, "best_useful_share"))}


def finite(seconds: float) -> float | None:
    """Return a number that JSON has, or None."""
    return seconds if isfinite(seconds) else None


def steps_in(seconds: float, step_seconds: float) -> int:
    """Return after how many steps a save comes that is due after so long: at the end of a step, of the first at
    least."""
    return max(1, ceil(seconds / step_seconds - 1e-9))


def why_not(recipe: Recipe) -> str | None:
    """Return which fact a prediction lacks, or None."""
    cluster = recipe.cluster
    if cluster.device == "cpu":
        return f"cluster={cluster.name} has no GPUs"
    if cluster.storage_gigabytes_per_second is None:
        return f"cluster={cluster.name} gives no storage_gigabytes_per_second"
    if recipe.run.abort_seconds is None:
        return "run.abort_seconds = null ends no run that hangs"
    return None


def goodput(recipe: Recipe, layout: Layout, *, step_seconds: float, run_seconds: float) -> Goodput:
    """Return the prediction; only where :func:`why_not` returns None.

    Args:
        step_seconds: of a step without saves.
        run_seconds: of all steps.
    """
    written = bytes_written(recipe, layout, layers_of_stages(recipe))
    rate = failures_per_second(recipe, layout)
    kinds = kinds_of_save(recipe, written)
    costs = list(kinds.values())
    best_seconds = best_intervals(rate, costs)
    best = [_in_steps(seconds, step_seconds) for seconds in best_seconds]
    own = {
        "memory": recipe.checkpoint.memory_every_steps * step_seconds,
        "disk": _planned_seconds(recipe, kinds["disk"], best_seconds[-1], step_seconds, run_seconds),
    }
    planned = [_in_steps(own[name], step_seconds) for name in kinds]
    return Goodput(
        failures_per_day=rate * DAY,
        checkpoint_bytes=sum(written),
        rank_bytes=max(written),
        assumptions=_assumptions(recipe, written),
        saves=tuple(KindOfSave(name, save, b, p) for (name, save), b, p in zip(kinds.items(), best, planned)),
        share=useful_share(rate, costs, planned),
        best_share=useful_share(rate, costs, best),
        step_seconds=step_seconds,
    )


def _assumptions(recipe: Recipe, written: list[int]) -> dict[str, float]:
    """Return what the prediction rests on."""
    cluster = recipe.cluster
    return {
        "cluster.failures_per_gpu_day": cluster.failures_per_gpu_day,
        "cluster.storage_gigabytes_per_second": _storage(recipe),
        "cluster.host_gigabytes_per_second": cluster.host_gigabytes_per_second,
        "cluster.start_seconds": cluster.start_seconds,
        "run.abort_seconds": detect_seconds(recipe),
        "load_seconds": load_seconds(recipe, written),
        **({"memory_survives": MEMORY_SURVIVES} if recipe.checkpoint.memory_every_steps else {}),
    }


def planned_minutes(recipe: Recipe, layout: Layout) -> float:
    """Return what ``checkpoint.every_minutes=auto`` stands for. It is the same on every rank, and whenever the run
    resumes on as many: nothing of it is measured."""
    kinds = kinds_of_save(recipe, bytes_written(recipe, layout, layers_of_stages(recipe)))
    *_, between = best_intervals(failures_per_second(recipe, layout), list(kinds.values()))
    # Minutes are counted from the beginning of a save.
    return round((between + kinds["disk"].stall_seconds) / 60, 3)


def with_planned_interval(recipe: Recipe, layout: Layout) -> Recipe:
    """Return the recipe with the planned minutes in place of ``checkpoint.every_minutes=auto``."""
    given = recipe.checkpoint
    if given.every_minutes != "auto":
        return recipe
    planned = given.model_copy(update={"every_minutes": planned_minutes(recipe, layout)})
    return recipe.model_copy(update={"checkpoint": planned})


def failures_per_second(recipe: Recipe, layout: Layout) -> float:
    """Return the failures of all devices that a run uses."""
    return recipe.cluster.failures_per_gpu_day * layout.world_size / DAY


def detect_seconds(recipe: Recipe) -> float:
    """Return how long a failed run does nothing before it ends: the most that takes, as where a rank hangs."""
    assert recipe.run.abort_seconds is not None
    return recipe.run.abort_seconds


def load_seconds(recipe: Recipe, written: list[int]) -> float:
    """Return how long reading a checkpoint takes: every rank reads what it has written."""
    return sum(written) / (1e9 * _storage(recipe))


def _storage(recipe: Recipe) -> float:
    given = recipe.cluster.storage_gigabytes_per_second
    assert given is not None
    return given


def kinds_of_save(recipe: Recipe, written: list[int]) -> dict[str, Save]:
    """Return the kinds of save that a recipe has, that of the shortest recovery first. ``written``: bytes by rank."""
    disk = disk_save(recipe, written)
    if not recipe.checkpoint.memory_every_steps:
        return {"disk": disk}
    return {"memory": memory_save(recipe, written), "disk": replace(disk, share=1 - MEMORY_SURVIVES)}


def memory_save(recipe: Recipe, written: list[int]) -> Save:
    """Return what a state in memory costs: the same copy to host memory, then, beside training, writing it into the
    node's memory and sending it to another node; after a failure it is compared with its checksums."""
    copy = max(written) / (1e9 * recipe.cluster.host_gigabytes_per_second)
    beside = max(written) / 1e9 * (1 / KEPT_GIGABYTES_PER_SECOND + 1 / SENT_GIGABYTES_PER_SECOND)
    compared = max(written) / (1e9 * COMPARED_GIGABYTES_PER_SECOND)
    recovery = detect_seconds(recipe) + recipe.cluster.start_seconds + compared
    return Save(copy, copy + beside, recovery, MEMORY_SURVIVES)


def disk_save(recipe: Recipe, written: list[int]) -> Save:
    """Return what a checkpoint costs: a copy to host memory, for which training stops, then writing to the file system,
    for which it stops unless ``checkpoint.asynchronous``. ``written``: bytes by rank."""
    copy = max(written) / (1e9 * recipe.cluster.host_gigabytes_per_second)
    whole = copy + load_seconds(recipe, written)  # files are written as fast as they are read
    recovery = detect_seconds(recipe) + recipe.cluster.start_seconds + load_seconds(recipe, written)
    return Save(copy if recipe.checkpoint.asynchronous else whole, whole, recovery)


def _planned_seconds(recipe: Recipe, save: Save, best: float, step_seconds: float, run_seconds: float) -> float:
    """Return the time between saves to disk as the recipe has it: what comes first of steps, minutes and the run's
    end. ``best``: what ``auto`` stands for."""
    given, found = recipe.checkpoint, [run_seconds]
    if given.every_steps:
        found.append(given.every_steps * step_seconds)
    if given.every_minutes == "auto":
        found.append(best)
    elif given.every_minutes:
        found.append(max(0.0, 60 * given.every_minutes - save.stall_seconds))
    return min(found)


def _in_steps(seconds: float, step_seconds: float) -> float:
    """Return the time until the end of the step in which a save is due."""
    return steps_in(seconds, step_seconds) * step_seconds if isfinite(seconds) else seconds
