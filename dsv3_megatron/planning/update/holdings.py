"""Which boxes of which matrices each rank of a stage holds, and the exchange's plan that follows: as a run's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from dsv3_megatron.checkpoint.boxes import boxes_of_run, common_box, strides_of
from dsv3_megatron.model.settings import ModelSettings
from dsv3_megatron.optim.matrices import Heads, Matrix, Rule, matrices_in, rule_of, rules
from dsv3_megatron.optim.spread import Box, Holding, Piece, Plan, boxes_of, make_plan
from dsv3_megatron.planning.update.parameters import Parameter
from dsv3_megatron.planning.update.runs import Run, buffers_of, copies_of, runs_of
from dsv3_megatron.recipe import Recipe
from parallel.layout import Layout

# Numbers of a piece at most (checkpoint.shares.PIECE): torch would come with it from there.
PIECE = 1 << 24


@dataclass(frozen=True)
class Group:
    """The ranks that hold the same dense parameters, or the same experts, or parts of them.

    Attributes:
        members: ranks of the world, in the group's order.
        runs: what each data-parallel rank among them updates.
        split: into how many ranks tensors are cut: member m is data-parallel rank m // split.
        plan: of their exchange; None: there is no matrix that Muon updates.
    """

    members: tuple[int, ...]
    runs: list[list[Run]]
    split: int
    plan: Plan | None


def table_of(recipe: Recipe) -> tuple[Rule, ...]:
    """Return which optimizer updates what."""
    return rules(recipe.optim, heads_of(recipe.model))


def heads_of(model: ModelSettings) -> Heads:
    """Return the shape of a model's attention, as matrices by head need it (train.muon has it for runs)."""
    return Heads(model.num_attention_heads, model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim)


def group_of(
    recipe: Recipe, layout: Layout, layers: tuple[int, ...], pipeline_rank: int, *, experts: bool, ep_rank: int = 0
) -> Group:
    """Return the group of a pipeline rank's stages and its exchange.

    Args:
        experts: of the optimizer for routed experts, not of that for the rest.
        ep_rank: whose experts.
    """
    copies, table = copies_of(recipe), table_of(recipe)
    if experts:
        ranks, split, name, offset = (
            layout.expert_dp * copies,
            layout.expert_tp,
            "expert_stage",
            ep_rank * layout.expert_tp,
        )
    else:
        ranks, split, name, offset = layout.dp * layout.cp * copies, layout.tp, "stage", 0
    members = layout.group(name, pipeline_rank * (layout.world_size // layout.pp) + offset)
    members = layout.mirrored(members) if copies > 1 else members
    runs = runs_of(buffers_of(recipe, layers, pipeline_rank, experts=experts), layout, ranks)
    if recipe.optim.name != "muon":
        return Group(members, runs, split, None)
    shapes: dict[str, tuple[int, int]] = {}
    holdings = [
        _holding(runs[rank], layout, table, tp_rank, ep_rank, shapes)
        for rank in range(ranks)
        for tp_rank in range(split)
    ]
    return Group(members, runs, split, make_plan(shapes, holdings) if shapes else None)


def by_muon(run: Run, table: tuple[Rule, ...]) -> bool:
    """Return whether Muon updates a run's parameter."""
    return rule_of(run.parameter.key, run.parameter.whole, table).split is not None


def _holding(
    runs: list[Run],
    layout: Layout,
    table: tuple[Rule, ...],
    tp_rank: int,
    ep_rank: int,
    shapes: dict[str, tuple[int, int]],
) -> Holding:
    """Return what one rank holds, and add the shapes of the matrices to ``shapes``."""
    found: list[Box] = []
    copies: set[int] = set()
    for run in runs:
        if not by_muon(run, table):
            continue
        before = len(found)
        matrices = _matrices(run.parameter, table)
        for piece in _pieces(run, layout, tp_rank, ep_rank):
            experts = range(piece.corner[0], piece.corner[0] + piece.extent[0]) if run.parameter.of_experts else (None,)
            for matrix in (matrix for expert in experts for matrix in matrices[expert]):
                for held in boxes_of(matrix, piece):
                    shapes[matrix.name] = matrix.shape
                    found.append(held.box)
        if run.parameter.cut is None and tp_rank:  # the first of them sends what all hold
            copies.update(range(before, len(found)))
    return Holding(tuple(found), frozenset(copies))


@lru_cache(maxsize=1024)
def _matrices(parameter: Parameter, table: tuple[Rule, ...]) -> dict[int | None, list[Matrix]]:
    """Return the matrices of a parameter by the expert they belong to."""
    found: dict[int | None, list[Matrix]] = {}
    for matrix in matrices_in(parameter.key, parameter.whole, table):
        found.setdefault(matrix.expert, []).append(matrix)
    return found


def _pieces(run: Run, layout: Layout, tp_rank: int, ep_rank: int) -> Iterator[Piece]:
    """Yield the boxes of a run, as checkpoints cut it (checkpoint.shares)."""
    shape = run.parameter.local(layout)
    strides = strides_of(shape)
    boxes = list(boxes_of_run(shape, run.start, run.end, PIECE))
    for corner, place in run.parameter.places(layout, tp_rank, ep_rank):
        for box in boxes:
            if (common := common_box(box, place)) is None:
                continue
            at = tuple(c + start - first for c, start, first in zip(corner, common.start, place.start))
            offset = sum(a * b for a, b in zip(common.start, strides)) - run.start
            yield Piece(at, common.extent, strides, offset)
