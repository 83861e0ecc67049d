"""What would help: concrete overrides, each with what it saves on the tightest rank and what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dsv3_megatron.planning.memory.formulae import estimate_stages
from dsv3_megatron.planning.plan import Plan, make_plan
from dsv3_megatron.recipe import Recipe
from parallel.errors import UserError

_TOGETHER = 5  # overrides to combine at most
_SELECTIVE = ("norm", "mla_up", "moe_act", "shared_experts", "mlp", "attention")


def alternatives(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """Yield overrides worth a try, and the recipe with them."""
    parallel = recipe.parallel

    def changed(text: str, section: str, **values: object) -> tuple[str, Recipe]:
        part = getattr(recipe, section).model_copy(update=values)
        return text, recipe.model_copy(update={section: part})

    for name in _SELECTIVE:
        if name not in parallel.recompute and "full" not in parallel.recompute:
            more = (*parallel.recompute, name)
            yield changed(f"parallel.recompute=[{','.join(more)}]", "parallel", recompute=more)
    if "full" not in parallel.recompute:
        yield changed("parallel.recompute=[full]", "parallel", recompute=("full",))
    for name in parallel.recompute:
        less = tuple(n for n in parallel.recompute if n != name)
        yield changed(f"parallel.recompute=[{','.join(less)}]", "parallel", recompute=less)
    if parallel.expert * 2 <= recipe.model.n_routed_experts:
        yield changed(f"parallel.expert={parallel.expert * 2}", "parallel", expert=parallel.expert * 2)
    for schedule in ("dualpipev", "1f1b", "zb1p"):
        if parallel.pipeline > 1 and schedule != parallel.schedule:
            yield changed(
                f"parallel.schedule={schedule} parallel.stages=null",
                "parallel",
                schedule=schedule,
                stages=None,
                chunks=1,
            )
    if parallel.tensor * 2 <= recipe.cluster.fast_domain:
        yield changed(f"parallel.tensor={parallel.tensor * 2}", "parallel", tensor=parallel.tensor * 2)
    if recipe.optim.micro_batch > 1:
        yield changed("optim.micro_batch=1", "optim", micro_batch=1)
    if recipe.run.start_from:  # what begins at random must be trained
        for frozen in (("experts",), ("experts", "embedding", "head")):
            if more := tuple(name for name in frozen if name not in recipe.model.freeze):
                both = (*recipe.model.freeze, *more)
                yield changed(f"model.freeze=[{','.join(both)}]", "model", freeze=both)
    if recipe.precision.parameters == "bf16" and recipe.precision.moments != "bf16":
        yield changed("precision.moments=bf16", "precision", moments="bf16")
    fp8 = recipe.precision.fp8
    if fp8 is not None and recipe.backend == "te" and not fp8.hold_weights:
        held = recipe.precision.model_copy(update={"fp8": fp8.model_copy(update={"hold_weights": True})})
        yield "precision.fp8.hold_weights=true", recipe.model_copy(update={"precision": held})


@dataclass(frozen=True)
class _Priced:
    """An override, or several, and the plan with them, by the formulae."""

    text: str
    recipe: Recipe
    plan: Plan

    @property
    def bytes(self) -> int:
        """Of the tightest rank."""
        return self.plan.tightest.total_bytes

    @property
    def seconds(self) -> float:
        """Of a step; 0 where the cluster's facts price none."""
        return self.plan.step.seconds if self.plan.step else 0.0


def advice(plan: Plan, most: int = 6) -> list[str]:
    """Return lines that say which overrides save memory where it is tight, or time where there is memory to spare.

    Both sides of each comparison are priced by the formulae, so that they differ by the override alone.
    """
    world = plan.layout.world_size
    base = _Priced("", plan.recipe, make_plan(plan.recipe, world, measure=estimate_stages))
    rank = base.plan.tightest.pipeline_rank
    limit = plan.tightest.limit_bytes
    # What the formulae miss of this plan they miss of its neighbours too.
    room = None if limit is None else limit - (plan.tightest.total_bytes - base.bytes)
    priced = list(_priced(plan.recipe, world))
    if plan.fits:  # to train less is no way to be faster
        priced = [other for other in priced if other.recipe.model.freeze == plan.recipe.model.freeze]
    found: list[tuple[float, str]] = []
    for other in priced:
        saved = base.bytes - other.bytes
        slower = _slower(other, base)
        fits = room is None or other.bytes <= room
        if (saved > 2**26 and slower > -0.001) or (saved > 2**26 and not plan.fits):
            tail = ", and it fits" if fits and not plan.fits else ""
            less = f"{saved / 2**30:.1f} GiB on rank {rank}"
            found.append((-saved, f"{other.text} saves {less}, step {slower:+.1%}{tail}"))
        elif slower < -0.002 and fits and plan.fits:
            found.append((slower * 2**40, f"{other.text} makes the step {-slower:.1%} shorter and still fits"))
    lines = [text for _, text in sorted(found)[:most]]
    if room is None or plan.fits or any(other.bytes <= room for other in priced):
        return lines
    return [*lines, _together(base, priced, world, room)]


def _slower(other: _Priced, base: _Priced) -> float:
    return other.seconds / base.seconds - 1 if base.seconds and other.seconds else 0.0


def _priced(recipe: Recipe, world: int) -> Iterator[_Priced]:
    for text, other in alternatives(recipe):
        try:
            other.check()
            yield _Priced(text, other, make_plan(other, world, measure=estimate_stages))
        except UserError:  # it cannot be: no advice
            continue


def _together(base: _Priced, priced: list[_Priced], world: int, room: int) -> str:
    """Return a line with overrides that make a plan fit together, where none does alone: the one that saves most, then
    the next, and of those that are enough the fastest."""
    chosen = base
    taken: dict[str, str] = {}

    def words() -> str:
        return " ".join(f"{key}={value}" for key, value in taken.items())

    for _ in range(_TOGETHER):
        fitting = [other for other in priced if other.bytes <= room]
        best = min(fitting, key=lambda p: p.seconds) if fitting else min(priced, key=lambda p: p.bytes, default=chosen)
        if best.bytes >= chosen.bytes:
            break
        chosen = best
        taken |= dict(word.split("=", 1) for word in best.text.split())
        if fitting:
            return f"together {words()} make it fit: {chosen.bytes / 2**30:.1f} GiB, step {_slower(chosen, base):+.1%}"
        priced = list(_priced(chosen.recipe, world))
    return (
        f"even {words() or 'no override'} leaves {(chosen.bytes - room) / 2**30:.1f} GiB too much: take more GPUs "
        "(search=true cluster.nodes=N finds their layout)"
    )
