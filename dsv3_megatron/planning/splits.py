"""Splits of the layers over stages: from the balanced one towards shorter steps, one layer moved at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from dsv3_megatron.planning.plan import Plan
from parallel.errors import UserError

Layers = tuple[int, ...]
_MOVES = 12  # tried from one split before it is taken for the best


def shorter_split(plan: Plan, make: Callable[[Layers], Plan], *, tries: int) -> Plan:
    """Return the best plan that moving single layers between stages leads to: one that fits if any does, then the
    shortest step.

    Args:
        plan: to begin with.
        make: the plan of another split; may raise UserError where that cannot be.
        tries: plans made at most.
    """
    best, seen = plan, {plan.layers}
    while tries > 0:
        for layers in _moves(best):
            if layers in seen:
                continue
            seen.add(layers)
            tries -= 1
            try:
                other = make(layers)
            except UserError:
                other = best
            if better(other, best):
                best = other
                break  # on from there
            if not tries:
                return best
        else:
            return best
    return best


def better(one: Plan, other: Plan) -> bool:
    """Return whether a plan is to be preferred: it alone fits, its step is shorter or, if none fits, it holds less."""
    if one.fits != other.fits:
        return one.fits
    if not one.fits:
        return one.tightest.total_bytes < other.tightest.total_bytes
    return one.priced_step.seconds < other.priced_step.seconds * (1 - 1e-6)


def _moves(plan: Plan) -> Iterator[Layers]:
    """Yield splits with one layer moved, from stages whose ranks have most to do (or hold, where it does not fit) to
    those that have least."""
    stages = range(len(plan.layers))
    load = _load(plan)
    order = [(s, t) for s in stages for t in stages if s != t and plan.layers[s] > 1]
    order.sort(key=lambda move: load[move[1]] - load[move[0]])
    for giver, taker in order[:_MOVES]:
        yield tuple(n - (s == giver) + (s == taker) for s, n in enumerate(plan.layers))


def _load(plan: Plan) -> list[float]:
    """Return, by stage, what the busiest of its ranks works (seconds), or holds (bytes) where the plan does not fit."""
    place, stages = plan.schedule.placement, range(len(plan.layers))

    def worked(stage: int) -> float:
        work = plan.priced_model.stage(stage)
        return work.forward.alone + work.input_grad.alone + work.weight_grad.alone

    if plan.fits:
        alone = [worked(s) for s in stages]
        of_rank = [sum(alone[s] for s in place.stages_of(rank)) for rank in range(place.ranks)]
        # Stages of one rank are told apart by their own work: a pipeline is paced by its slowest stage too.
        return [max(of_rank[r] for r in range(place.ranks) if s in place.stages_of(r)) + alone[s] for s in stages]
    return [
        float(max(plan.ranks[r].total_bytes for r in range(place.ranks) if s in place.stages_of(r))) for s in stages
    ]
