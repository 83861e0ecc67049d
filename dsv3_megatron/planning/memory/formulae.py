"""What a stage holds, by formula: the fast path of the planner, for searches and for ``--fast``. No torch.

The exact path runs the real modules (activations.py); these formulae say what it found, term by term, and a test holds
them to it. What the parts of a stage hold is in parts.py; here a pass goes through them, one after the other.
"""

from __future__ import annotations

from dsv3_megatron.model.composition import composition, frozen_as_a_whole
from dsv3_megatron.model.costs import frozen_by_part, part_sizes
from dsv3_megatron.model.freeze import MTP
from dsv3_megatron.planning.memory.parts import Part, Parts
from dsv3_megatron.planning.memory.stage_memory import StageMemory
from dsv3_megatron.recipe import Recipe
from parallel.layout import Layout
from parallel.pipeline.actions import Schedule


def estimate_stages(recipe: Recipe, layout: Layout, layers: tuple[int, ...], schedule: Schedule) -> list[StageMemory]:
    """Return what every stage holds (planning.memory.activations.measure_stages measures it)."""
    parts = Parts(recipe, layout, planned="FB" in schedule.kinds, splits=bool(schedule.kinds & {"FB", "I", "W"}))
    return [_stage(parts, layers, stage) for stage in range(len(layers))]


def _stage(parts: Parts, layers: tuple[int, ...], stage: int) -> StageMemory:
    parameters, experts, in_fp8 = stage_parameters(parts.recipe, parts.layout, layers, stage)
    frozen, frozen_experts = frozen_parameters(parts.recipe, parts.layout, layers, stage)
    before, inner, after = _parts_of_stage(parts, layers, stage)
    everything = [before, *inner, after]
    kept = sum(part.kept for part in everything)
    deferred = sum(part.deferred for part in everything) if parts.splits else 0.0
    backward = _overlapped(parts, before, inner, after) if parts.planned else _backward(everything, splits=parts.splits)
    return StageMemory(
        parameters=parameters,
        expert_parameters=experts,
        fp8_parameters=in_fp8,
        kept=round(kept),
        held=0,
        kept_deferred=round(deferred),
        peak_forward=round(_forward(everything)),
        peak_backward=round(backward),
        peak_weight_grad=round(deferred) if parts.splits else 0,
        message=round(parts.message),
        frozen=frozen,
        frozen_experts=frozen_experts,
    )


def _parts_of_stage(parts: Parts, layers: tuple[int, ...], stage: int) -> tuple[Part, list[Part], Part]:
    """Return what precedes the layers of a stage, attention and block of each in turn, and what follows them."""
    has = composition(parts.model, layers, stage)
    whole = frozen_as_a_whole(parts.model, layers, stage)
    moe = [False] * has.dense + [True] * has.moe
    kinds = [parts.layer(moe=is_moe, frozen=frozen) for is_moe, frozen in zip(moe, whole)]
    for number in range(len(kinds) - has.mtp, len(kinds)):
        attention, block = kinds[number]
        kinds[number] = [_joined(parts.joint(), attention), block]
    before = parts.embedding(1 + has.mtp) if stage == 0 else parts.received()
    after = parts.heads(has.predictions) if has.predictions else Part()
    return before, [part for layer in kinds for part in layer], after


def _joined(first: Part, second: Part) -> Part:
    """Return two parts as one."""
    return Part(
        kept=first.kept + second.kept,
        deferred=first.deferred + second.deferred,
        gradients=first.gradients + second.gradients,
        forward=second.forward,
        backward=max(first.backward - second.kept, second.backward),
    )


def _forward(parts: list[Part]) -> float:
    """Return the peak of a forward."""
    level, peak = 0.0, 0.0
    for part in parts:
        level += part.kept
        peak = max(peak, level + part.forward)
    return peak


def _backward(parts: list[Part], *, splits: bool) -> float:
    """Return the peak of a backward that runs alone."""
    level = peak = sum(part.kept for part in parts)
    for part in reversed(parts):
        peak = max(peak, level + part.backward)
        level += (part.deferred if splits else 0.0) - part.kept
    return max(peak, level)


def _overlapped(parts: Parts, before: Part, inner: list[Part], after: Part) -> float:
    """Return the peak of a backward beside a forward, above what both microbatches hold before (megatron-core's plan).

    Layer i of the forward runs beside layer n - i of the backward: the backward's exchange, the forward's attention,
    the backward's experts, the forward's exchanges and experts, the backward's attention.
    """
    level = before.kept
    peak = level + after.backward
    level -= after.kept
    pairs = list(zip(inner[::2], inner[1::2]))
    for (attention, block), (b_attention, b_block) in zip(pairs, reversed(pairs)):
        level += attention.kept
        # The backward's products beside the rows that the forward will send; then those it has sent.
        paid = b_block.gradients + parts.message
        peak = max(peak, level + b_block.backward + block.rows, level + paid + 2 * block.rows)
        level += block.kept - b_block.kept
        # Gradients on both sides of the backward's exchange stay until the layer is done.
        waiting = 2 * b_block.rows
        normed = 2 * parts.message if "norm" in parts.recompute else 0.0
        peak = max(peak, level + waiting + block.forward + 4 * parts.message + normed)
        peak = max(peak, level + waiting + b_attention.backward)
        level -= b_attention.kept
    return max(peak, level + after.kept + after.forward + parts.message, level + before.backward)


def stage_parameters(recipe: Recipe, layout: Layout, layers: tuple[int, ...], stage: int) -> tuple[int, int, int]:
    """Return (all, those of routed experts, those of layers in FP8) parameters of a stage on one rank, exactly."""
    has, sizes = composition(recipe.model, layers, stage), _sizes(recipe, layout)
    count, experts = has.dense + has.moe, has.moe * sizes["experts"]
    linear = count * sizes["attention"] + has.dense * sizes["dense"] + has.moe * sizes["shared_experts"] + experts
    linear += has.mtp * sizes[MTP]
    other = count * sizes["norms"] + has.moe * sizes["router"] + has.mtp * sizes["joint norms"]
    other += has.embeddings * sizes["embedding"]
    if has.predictions:
        other += sizes["head"] + sizes["final norm"]
    fp8 = recipe.precision.fp8
    return linear + other, experts, linear if fp8 is not None else 0


def frozen_parameters(recipe: Recipe, layout: Layout, layers: tuple[int, ...], stage: int) -> tuple[int, int]:
    """Return (all, those of routed experts) parameters of a stage on one rank that are not trained, exactly."""
    found = frozen_by_part(recipe.model, _sizes(recipe, layout), composition(recipe.model, layers, stage))
    return sum(found.values()), found["experts"]


def _sizes(recipe: Recipe, layout: Layout) -> dict[str, int]:
    return part_sizes(recipe.model, tp=layout.tp, ep=layout.ep, expert_tp=layout.expert_tp)
