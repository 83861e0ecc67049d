"""Searching layouts of a given number of GPUs: hundreds, priced by formula over all cores, ranked by step time.

In two rounds. First degrees and schedules, each with the recomputation that saves most and one sequence a microbatch;
then recomputation and micro batch of the best of those. What does not fit ranks behind all that fits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context

from dsv3_megatron.planning.formulae import estimate_stages
from dsv3_megatron.planning.layout_check import check_layout
from dsv3_megatron.planning.plan import make_plan
from dsv3_megatron.recipe import Recipe
from parallel.errors import UserError

_THOROUGH = ("norm", "mla_up", "moe_act", "shared_experts")
_RECOMPUTE = ((), ("norm",), ("norm", "moe_act"), ("norm", "mla_up", "moe_act"), _THOROUGH)
_SCHEDULES = (("dualpipe", 1), ("dualpipev", 1), ("zb1p", 1), ("interleaved", 2), ("interleaved", 4), ("1f1b", 1))
_REFINED = 16  # layouts of the first round that go into the second


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
    """Yield degrees and schedules worth a try. Those that cannot be are refused when tried."""
    model = recipe.model
    contexts = (recipe.parallel.context,)
    tensors = [t for t in (1, 2, 4) if t <= max(recipe.cluster.gpus_per_node, 1)]
    experts = [e for e in (1, 8, 16, 32, 64, 128, 256) if model.n_routed_experts % e == 0 and world % e == 0]
    pipelines = [p for p in (1, 2, 4, 8, 16, 32) if world % p == 0 and p <= model.num_hidden_layers]
    for pipeline, expert, tensor, context in product(pipelines, experts, tensors, contexts):
        if world % (pipeline * tensor * context) or world % (pipeline * expert):
            continue
        for schedule, chunks in _SCHEDULES if pipeline > 1 else (("1f1b", 1),):
            degrees = {"pipeline": pipeline, "expert": expert, "tensor": tensor, "context": context}
            yield _task(recipe, world, {**degrees, "schedule": schedule, "chunks": chunks, "recompute": _THOROUGH}, 1)


def refinements(task: Task) -> Iterator[Task]:
    """Yield recomputations and micro batches of a layout."""
    _, recipe, world = task
    parallel = recipe.parallel
    names = ("pipeline", "expert", "tensor", "context", "schedule", "chunks")
    for recompute, micro_batch in product(_RECOMPUTE, (1, 2)):
        values = {name: getattr(parallel, name) for name in names}
        yield _task(recipe, world, {**values, "recompute": recompute}, micro_batch)


def _task(recipe: Recipe, world: int, parallel: dict[str, object], micro_batch: int) -> Task:
    def shown(value: object) -> str:
        return f"[{','.join(value)}]" if isinstance(value, tuple) else str(value)

    texts = [f"parallel.{name}={shown(value)}" for name, value in parallel.items()]
    changed = recipe.model_copy(
        update={
            "parallel": recipe.parallel.model_copy(update={**parallel, "stages": None}),
            "optim": recipe.optim.model_copy(update={"micro_batch": micro_batch}),
        }
    )
    return (*texts, f"optim.micro_batch={micro_batch}"), changed, world


def try_layout(task: Task) -> Found | None:
    """Return what a layout costs, or None where it cannot be."""
    overrides, recipe, world = task
    try:
        recipe.check()
        check_layout(recipe, world)
        plan = make_plan(recipe, world, measure=estimate_stages)
    except UserError:
        return None
    step = plan.step
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
        first = list(layouts(recipe, world))
        found = _run(pool, first, "layouts", progress)
        best = sorted((f for f in found if f[1]), key=lambda pair: rank_of(pair[1]))[:_REFINED]
        second = [task for pair in best for task in refinements(pair[0])]
        found += _run(pool, second, "refinements", progress)
        unique = {f.overrides: f for _, f in found if f is not None}
        return own.result(), sorted(unique.values(), key=rank_of), len(first) + len(second)


def rank_of(found: Found) -> tuple[bool, float]:
    """Return what layouts are sorted by: those that fit first, then by time."""
    return (not found.fits, found.seconds if found.fits else float(found.largest_bytes))


def _run(
    pool: ProcessPoolExecutor, tasks: Sequence[Task], name: str, progress: Callable[[str, int, int], None]
) -> list[tuple[Task, Found | None]]:
    results = []
    for number, (task, found) in enumerate(zip(tasks, pool.map(try_layout, tasks, chunksize=4)), 1):
        results.append((task, found))
        progress(name, number, len(tasks))
    return results


def why_it_wins(best: Found, own: Found) -> str:
    """Return in words where the time that the best layout saves over the recipe's own comes from."""
    changes = {
        "work of a rank": best.busy_seconds - own.busy_seconds,
        "waiting": best.bubble_seconds - own.bubble_seconds,
        "tail": best.tail_seconds - own.tail_seconds,
    }
    parts = [f"{name} {value:+.2f} s" for name, value in changes.items() if abs(value) >= 0.005]
    return f"{own.seconds - best.seconds:.2f} s shorter than the recipe's own: {', '.join(parts) or 'the same'}"
