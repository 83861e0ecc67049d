"""Searching layouts of a given number of GPUs: hundreds, priced by formula over all cores, ranked by step time.

In rounds, each of which takes the best of those before it: degrees and schedules, with the recomputation that saves
most and one sequence a microbatch; context parallelism; recomputation and micro batch; the split of layers over stages.
What does not fit ranks behind all that fits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context

from dsv3_megatron.planning.memory.formulae import estimate_stages
from dsv3_megatron.planning.plan import Plan, make_plan
from dsv3_megatron.planning.splits import Layers, shorter_split
from dsv3_megatron.preflight.layout import check_layout
from dsv3_megatron.recipe import Recipe
from parallel.errors import UserError

_THOROUGH = ("norm", "mla_up", "moe_act", "shared_experts")
_RECOMPUTE = ((), ("norm",), ("norm", "moe_act"), ("norm", "mla_up", "moe_act"), _THOROUGH)
_SCHEDULES = (("dualpipe", 1), ("dualpipev", 1), ("zb1p", 1), ("interleaved", 2), ("interleaved", 4), ("1f1b", 1))
_REFINED = 16  # layouts of a round that go into the next
_SPLIT, _SPLIT_TRIES = 6, 24  # layouts whose split is looked into, and plans made for each
_ONE_NODE = 16  # ranks up to which the GPUs of a node may be divided between stages and experts in any way
_LEAST_TOKENS = 1024  # of a sequence that a context-parallel rank keeps: below it products are too small to be worth it


@dataclass(frozen=True)
class Found:
    """A layout in the words of the recipe (no overrides: the recipe's own), and what a step of it costs."""

    overrides: tuple[str, ...]
    seconds: float
    bubble_seconds: float
    tail_seconds: float
    largest_bytes: int
    fits: bool

    @property
    def busy_seconds(self) -> float:
        """What the pipeline's ranks work, on average."""
        return self.seconds - self.bubble_seconds - self.tail_seconds


Task = tuple[tuple[str, ...], Recipe, int]


def layouts(recipe: Recipe, world: int) -> Iterator[Task]:
    """Yield degrees and schedules worth a try, with the recipe's own context parallelism. Those that cannot be are
    refused when tried."""
    model = recipe.model
    contexts = (recipe.parallel.context,)
    tensors = [t for t in (1, 2, 4) if t <= recipe.cluster.fast_domain]
    # Inside a node any degree is worth a try; over nodes a whole node at least.
    few = (2, 4) if world <= _ONE_NODE else ()
    experts = [e for e in (1, *few, 8, 16, 32, 64, 128, 256) if model.n_routed_experts % e == 0 and world % e == 0]
    pipelines = [p for p in (1, 2, 4, 8, 16, 32) if world % p == 0 and p <= model.num_hidden_layers]
    for pipeline, expert, tensor, context in product(pipelines, experts, tensors, contexts):
        if world % (pipeline * tensor * context) or world % (pipeline * expert):
            continue
        for schedule, chunks in _SCHEDULES if pipeline > 1 else (("1f1b", 1),):
            degrees = {"pipeline": pipeline, "expert": expert, "tensor": tensor, "context": context}
            values = {**degrees, "schedule": schedule, "chunks": chunks, "recompute": _effective(recipe, _THOROUGH)}
            yield _task(recipe, world, values, 1)


def contexts(task: Task) -> Iterator[Task]:
    """Yield other degrees of context parallelism for a layout."""
    _, recipe, world = task
    degree, values = 1, _values(recipe)
    while recipe.data.sequence_length // degree >= _LEAST_TOKENS:
        if degree != recipe.parallel.context:
            yield _task(recipe, world, {**values, "context": degree}, recipe.optim.micro_batch)
        degree *= 2


def refinements(task: Task) -> Iterator[Task]:
    """Yield recomputations and micro batches of a layout."""
    _, recipe, world = task
    recomputations = dict.fromkeys(_effective(recipe, names) for names in _RECOMPUTE)
    for recompute, micro_batch in product(recomputations, (1, 2)):
        yield _task(recipe, world, {**_values(recipe), "recompute": recompute}, micro_batch)


def _effective(recipe: Recipe, recompute: tuple[str, ...]) -> tuple[str, ...]:
    """Return the recomputations that change something: SwiGLU with a cache in FP8 is computed again anyway."""
    return tuple(name for name in recompute if not (recipe.precision.caches_swiglu and name == "moe_act"))


def _values(recipe: Recipe) -> dict[str, object]:
    names = ("pipeline", "expert", "tensor", "context", "schedule", "chunks", "recompute")
    return {name: getattr(recipe.parallel, name) for name in names}


def _task(recipe: Recipe, world: int, parallel: dict[str, object], micro_batch: int) -> Task:
    def shown(value: object) -> str:
        return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)

    texts = [f"parallel.{name}={shown(value)}" for name, value in parallel.items()]
    changed = recipe.model_copy(
        update={
            "parallel": recipe.parallel.model_copy(update={"stages": None, **parallel}),
            "optim": recipe.optim.model_copy(update={"micro_batch": micro_batch}),
        }
    )
    return (*texts, f"optim.micro_batch={micro_batch}"), changed, world


def try_split(task: Task) -> Found | None:
    """Return a layout with the split of its layers that makes the step shortest, or None: none beats the balanced."""
    _, recipe, world = task

    def make(layers: Layers) -> Plan:
        _, changed, _ = _task(recipe, world, {"stages": layers}, recipe.optim.micro_batch)
        return make_plan(changed, world, measure=estimate_stages)

    balanced = make_plan(recipe, world, measure=estimate_stages)
    best = shorter_split(balanced, make, tries=_SPLIT_TRIES)
    if best is balanced:
        return None
    texts, _, _ = _task(recipe, world, {**_values(recipe), "stages": best.layers}, recipe.optim.micro_batch)
    return _found(texts, best)


def try_layout(task: Task) -> Found | None:
    """Return what a layout costs, or None where it cannot be."""
    overrides, recipe, world = task
    try:
        recipe.check()
        check_layout(recipe, world)
        plan = make_plan(recipe, world, measure=estimate_stages)
    except UserError:
        return None
    return _found(overrides, plan)


def _found(overrides: tuple[str, ...], plan: Plan) -> Found:
    step = plan.priced_step
    tail = step.tail_seconds + step.optimizer_seconds
    return Found(overrides, step.seconds, step.bubble_seconds, tail, plan.tightest.total_bytes, plan.fits)


def search_layouts(
    recipe: Recipe,
    world: int,
    *,
    progress: Callable[[str, int, int], None] = lambda *of: None,
    processes: int | None = None,
) -> tuple[Found | None, list[Found], int]:
    """Return (the recipe's own layout, all layouts that can be, best first, how many were tried)."""
    processes = processes or os.cpu_count() or 1
    with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:
        own = pool.submit(try_layout, ((), recipe, world))
        found: dict[tuple[str, ...], tuple[Task, Found]] = {}
        tried = 0

        def go(name: str, tasks: Sequence[Task], attempt: Callable[[Task], Found | None]) -> None:
            nonlocal tried
            new = [task for task in dict((task[0], task) for task in tasks).values() if task[0] not in found]
            tried += len(new)
            for task, result in _run(pool, new, name, attempt, progress):
                if result is not None:
                    found[result.overrides] = (task, result)

        def best(many: int) -> list[Task]:
            return [task for task, _ in sorted(found.values(), key=lambda pair: rank_of(pair[1]))[:many]]

        go("layouts", list(layouts(recipe, world)), try_layout)
        go("context parallelism", [other for task in best(_REFINED) for other in contexts(task)], try_layout)
        go("refinements", [other for task in best(_REFINED) for other in refinements(task)], try_layout)
        go("splits over stages", [(("split", *task[0]), *task[1:]) for task in best(_SPLIT)], try_split)
        return own.result(), sorted((f for _, f in found.values()), key=rank_of), tried


def rank_of(found: Found) -> tuple[bool, float]:
    """Return what layouts are sorted by: those that fit first, then by time."""
    return (not found.fits, found.seconds if found.fits else float(found.largest_bytes))


def _run(
    pool: ProcessPoolExecutor,
    tasks: Sequence[Task],
    name: str,
    attempt: Callable[[Task], Found | None],
    progress: Callable[[str, int, int], None],
) -> list[tuple[Task, Found | None]]:
    results = []
    chunk = 1 if attempt is try_split else 4
    for number, (task, found) in enumerate(zip(tasks, pool.map(attempt, tasks, chunksize=chunk)), 1):
        results.append((task, found))
        progress(name, number, len(tasks))
    return results


def other_degrees(found: Sequence[Found]) -> Found | None:
    """Return the next layout that fits and differs from the first in its degrees of parallelism, or None."""

    def degrees(one: Found) -> set[str]:
        names = ("pipeline", "expert", "tensor", "context")
        return {word for word in one.overrides if word.removeprefix("parallel.").split("=")[0] in names}

    return next((one for one in found[1:] if one.fits and degrees(one) != degrees(found[0])), None)


def why_it_wins(best: Found, other: Found, name: str) -> str:
    """Return in words where the time that the best layout saves over another comes from."""
    changes = {
        "work of a rank": best.busy_seconds - other.busy_seconds,
        "waiting": best.bubble_seconds - other.bubble_seconds,
        "tail": best.tail_seconds - other.tail_seconds,
    }
    parts = [f"{what} {value:+.2f} s" for what, value in changes.items() if abs(value) >= 0.005]
    return f"{other.seconds - best.seconds:.2f} s shorter than {name}: {', '.join(parts) or 'the same'}"
