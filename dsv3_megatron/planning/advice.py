"""What would help: concrete overrides, each with what it saves on the tightest rank and what it costs."""

from __future__ import annotations

from collections.abc import Iterator

from dsv3_megatron.planning.memory.formulae import estimate_stages
from dsv3_megatron.planning.plan import Plan, make_plan
from dsv3_megatron.recipe import Recipe
from parallel.errors import UserError

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
    if recipe.optim.micro_batch > 1:
        yield changed("optim.micro_batch=1", "optim", micro_batch=1)
    fp8 = recipe.precision.fp8
    if fp8 is not None and recipe.backend == "te" and not fp8.hold_weights:
        held = recipe.precision.model_copy(update={"fp8": fp8.model_copy(update={"hold_weights": True})})
        yield "precision.fp8.hold_weights=true", recipe.model_copy(update={"precision": held})


def advice(plan: Plan, most: int = 6) -> list[str]:
    """Return lines that say which overrides save memory where it is tight, or time where there is memory to spare.

    Both sides of each comparison are priced by the formulae, so that they differ by the override alone.
    """
    world = plan.layout.world_size
    base = make_plan(plan.recipe, world, measure=estimate_stages)
    rank = base.tightest.pipeline_rank
    limit = plan.tightest.limit_bytes
    # What the formulae miss of this plan they miss of its neighbours too.
    miss = plan.tightest.total_bytes - base.tightest.total_bytes
    found: list[tuple[float, str]] = []
    for text, recipe in alternatives(plan.recipe):
        try:
            recipe.check()
            other = make_plan(recipe, world, measure=estimate_stages)
        except UserError:  # it cannot be: no advice
            continue
        saved = base.tightest.total_bytes - other.tightest.total_bytes
        slower = other.step.seconds / base.step.seconds - 1 if base.step and other.step else 0.0
        fits = limit is None or other.tightest.total_bytes + miss <= limit
        if (saved > 2**26 and slower > -0.001) or (saved > 2**26 and not plan.fits):
            tail = ", and it fits" if fits and not plan.fits else ""
            found.append((-saved, f"{text} saves {saved / 2**30:.1f} GiB on rank {rank}, step {slower:+.1%}{tail}"))
        elif slower < -0.002 and fits and plan.fits:
            found.append((slower * 2**40, f"{text} makes the step {-slower:.1%} shorter and still fits"))
    return [text for _, text in sorted(found)[:most]]
