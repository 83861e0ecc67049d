"""Bytes of a checkpoint that every rank writes, from shapes alone: numbers of weights, masters, moments and average.

What is added to them in the files is not counted: a header of a kilobyte for each piece of sixteen million numbers, the
table of pieces, the index; nor are the amaxes of delayed scaling, a few numbers for each matrix.
"""

from __future__ import annotations

from collections.abc import Iterator

from dsv3_megatron.checkpoint.boxes import even_runs
from dsv3_megatron.planning.update.holdings import by_muon, group_of, table_of
from dsv3_megatron.planning.update.parameters import EMBEDDING, Parameter, stage_parameters
from dsv3_megatron.planning.update.runs import Run
from dsv3_megatron.planning.update.states import data_ranks
from dsv3_megatron.recipe import Recipe
from parallel.layout import Layout

_FLOAT32 = 4
Written = list[tuple[int, int]]  # by data-parallel rank: the first of its tensor-parallel ranks, each of the others


def bytes_written(recipe: Recipe, layout: Layout, layers: tuple[int, ...]) -> list[int]:
    """Return the bytes of tensors that each rank of the world writes into a checkpoint, which are those it reads when a
    run resumes in the same layout.

    Args:
        layers: of every stage.
    """
    return [size for rank in range(layout.pp) for size in _of_pipeline_rank(recipe, layout, layers, rank)]


def _of_pipeline_rank(recipe: Recipe, layout: Layout, layers: tuple[int, ...], pipeline_rank: int) -> Iterator[int]:
    """Yield the bytes of every rank of a pipeline rank, by number in it."""
    dense, experts = (group_of(recipe, layout, layers, pipeline_rank, experts=e) for e in (False, True))
    of_dense = _of_group(recipe, layout, layers, pipeline_rank, dense.runs, experts=False)
    of_experts = _of_group(recipe, layout, layers, pipeline_rank, experts.runs, experts=True)
    biases = _bias_bytes(recipe, layers, pipeline_rank)
    for number, (d, e) in enumerate(data_ranks(layout, pipeline_rank, dense, experts)):
        tp_rank, expert_tp_rank = number % layout.tp, number % layout.expert_tp
        first = d == 0 and tp_rank == 0  # of those that hold the same biases
        yield of_dense[d][tp_rank > 0] + of_experts[e][expert_tp_rank > 0] + (biases if first else 0)


def _of_group(
    recipe: Recipe,
    layout: Layout,
    layers: tuple[int, ...],
    pipeline_rank: int,
    trained: list[list[Run]],
    *,
    experts: bool,
) -> Written:
    """Return what the ranks write that divide a pipeline rank's dense parameters, or experts. ``trained``: their runs
    of what is trained."""
    frozen = _frozen_runs(recipe, layout, layers, pipeline_rank, len(trained), experts=experts)
    has_first_stage = 0 in recipe.placement().stages_of(pipeline_rank)
    table = table_of(recipe)
    known: dict[Parameter, tuple[int, bool, bool]] = {}

    def facts(run: Run, weights_alone: bool) -> tuple[int, bool, bool]:
        """Return bytes of a number, whether this group writes it at all, and whether all its tensor ranks do."""
        parameter = run.parameter
        if parameter not in known:
            size = _bytes_of_number(recipe, moments=1 if by_muon(run, table) else 2, weights_alone=weights_alone)
            mine = has_first_stage or parameter.key != EMBEDDING  # the last stage's copy is not stored
            known[parameter] = (size, mine, parameter.cut is not None)
        return known[parameter]

    def written(runs: list[Run], stood: list[Run], *, first: bool) -> int:
        total = 0
        for run, weights_alone in [*((run, False) for run in runs), *((run, True) for run in stood)]:
            size, mine, all_write = facts(run, weights_alone)
            total += run.numbers * size if mine and (first or all_write) else 0
        return total

    return [
        (written(runs, stood, first=True), written(runs, stood, first=False)) for runs, stood in zip(trained, frozen)
    ]


def _bytes_of_number(recipe: Recipe, *, moments: int, weights_alone: bool) -> int:
    """Return the bytes of a number in a checkpoint: the weight (16 bits where FP8 holds it), its float32 master, its
    moments and the average."""
    precision = recipe.precision
    weight = 2 if precision.parameters == "bf16" else _FLOAT32
    if weights_alone:
        return weight
    moment = 2 if precision.moments == "bf16" else _FLOAT32
    return weight + _FLOAT32 + moments * moment + (0 if recipe.optim.ema_decay is None else _FLOAT32)


def _frozen_runs(
    recipe: Recipe, layout: Layout, layers: tuple[int, ...], pipeline_rank: int, ranks: int, *, experts: bool
) -> list[list[Run]]:
    """Return which frozen numbers each of ``ranks`` writes: those of a stage are cut evenly (checkpoint.shares)."""
    found: list[list[Run]] = [[] for _ in range(ranks)]
    for parameters in _by_stage(recipe, layers, pipeline_rank, frozen=True):
        mine = [parameter for parameter in parameters if parameter.of_experts == experts]
        for parameter, runs in zip(mine, even_runs([parameter.numbers(layout) for parameter in mine], ranks)):
            for each, (start, end) in zip(found, runs):
                if start < end:
                    each.append(Run(parameter, start, end))
    return found


def _bias_bytes(recipe: Recipe, layers: tuple[int, ...], pipeline_rank: int) -> int:
    """Return the bytes of router biases of a pipeline rank's stages, and once more of those beside the average."""
    model = recipe.model
    if model.topk_method != "noaux_tc" or model.scoring_func != "sigmoid" or _is_second(recipe, pipeline_rank):
        return 0
    stages = recipe.placement().stages_of(pipeline_rank)
    decoder = [layer for s in stages for layer in range(sum(layers[:s]), sum(layers[: s + 1]))]
    routers = sum(layer >= model.first_k_dense_replace for layer in decoder)
    if len(layers) - 1 in stages and model.num_moe_layers:
        routers += model.num_nextn_predict_layers
    return routers * model.n_routed_experts * _FLOAT32 * (1 if recipe.optim.ema_decay is None else 2)


def _is_second(recipe: Recipe, pipeline_rank: int) -> bool:
    """Return whether another pipeline rank, before this one, holds the same stages."""
    place = recipe.placement()
    return place.mirrored and 2 * pipeline_rank >= place.ranks


def _by_stage(
    recipe: Recipe, layers: tuple[int, ...], pipeline_rank: int, *, frozen: bool
) -> Iterator[list[Parameter]]:
    """Yield the parameters of every stage of a pipeline rank."""
    stages = recipe.placement().stages_of(pipeline_rank)
    meet = {0, len(layers) - 1} <= set(stages) and len(layers) > 1
    for stage in stages:
        yield stage_parameters(recipe, layers, stage, borrowed=meet, frozen=frozen)
