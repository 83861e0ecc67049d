"""Muon's update of every pipeline rank: who does what at the end of a step, and what that takes of memory."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

from dsv3_megatron.model.settings import ModelSettings
from dsv3_megatron.optim.settings import MuonSettings
from dsv3_megatron.planning.update.exchange_memory import Round, most_bytes, rounds_of
from dsv3_megatron.planning.update.holdings import Group, by_muon, group_of, table_of
from dsv3_megatron.planning.update.runs import Run, buffers_of
from dsv3_megatron.planning.update.states import state_bytes_of_ranks
from dsv3_megatron.precision.settings import PrecisionSettings
from dsv3_megatron.recipe import Recipe
from parallel.layout import Layout
from parallel.pipeline.actions import Placement

_LAYER = re.compile(r"\blayers\.\d+\.")


@dataclass(frozen=True)
class GroupUpdate:
    """What a group of ranks does.

    Attributes:
        group: who they are, and their exchange.
        rounds: of every member.
        by_muon, by_adamw: most numbers that one member updates.
    """

    group: Group
    rounds: list[list[Round]]
    by_muon: int
    by_adamw: int


@dataclass(frozen=True)
class RankUpdate:
    """The end of a step on the ranks of one pipeline rank.

    Attributes:
        parts: of the dense parameters, then of the experts, as they are updated.
        state_bytes: of the rank that holds most.
        exchange_bytes: beside those, the most that any has while matrices are exchanged and worked on.
        size: bytes of a number that travels.
    """

    parts: tuple[GroupUpdate, GroupUpdate]
    state_bytes: int
    exchange_bytes: int
    size: int


def size_of_number(recipe: Recipe) -> int:
    """Return the bytes of a number that travels, and is worked on (optim.muon.arithmetic)."""
    return {"bf16": 2, "fp32": 4}[recipe.optim.muon.arithmetic_on(recipe.cluster.device)]


def updates_of_ranks(recipe: Recipe, layout: Layout, layers: tuple[int, ...]) -> list[RankUpdate]:
    """Return the update of every pipeline rank. Those of equal stages have the first's, but for the names: ties between
    owners, which names break, may be broken otherwise. Of experts, those of the first expert-parallel rank are taken.
    """
    asked = _Asked(
        recipe,
        recipe.model,
        recipe.optim.muon,
        recipe.precision,
        recipe.backend,
        recipe.placement(),
        layout,
        layers,
        size_of_number(recipe),
    )
    return list(_updates(asked))


@dataclass(frozen=True)
class _Asked:
    """What an update depends on: a search asks for the same one under many recomputations and micro batches."""

    recipe: Recipe = field(compare=False)
    model: ModelSettings
    muon: MuonSettings
    precision: PrecisionSettings
    backend: str
    placement: Placement
    layout: Layout
    layers: tuple[int, ...]
    size: int


@lru_cache(maxsize=16)
def _updates(asked: _Asked) -> list[RankUpdate]:
    recipe, layout, layers = asked.recipe, asked.layout, asked.layers
    known: dict[object, RankUpdate] = {}
    found = []
    mirrored = recipe.placement().mirrored
    for rank in range(layout.pp):
        shapes = tuple(
            tuple((_LAYER.sub("layers.", p.key), p.whole, p.shared) for p in buffer)
            for experts in (False, True)
            for buffer in buffers_of(recipe, layers, rank, experts=experts)
        )
        alike = (mirrored and 2 * rank >= layout.pp, shapes)  # of a mirrored pair, each divides its half
        if alike not in known:
            known[alike] = _update(recipe, layout, layers, rank)
        found.append(known[alike])
    return found


def _update(recipe: Recipe, layout: Layout, layers: tuple[int, ...], rank: int) -> RankUpdate:
    dense, experts = (_part(recipe, layout, layers, rank, experts=of_experts) for of_experts in (False, True))
    return RankUpdate(
        (dense, experts),
        state_bytes=max(state_bytes_of_ranks(recipe, layout, rank, dense.group, experts.group)),
        exchange_bytes=max(_exchange_bytes(recipe, part) for part in (dense, experts)),
        size=size_of_number(recipe),
    )


def _part(recipe: Recipe, layout: Layout, layers: tuple[int, ...], rank: int, *, experts: bool) -> GroupUpdate:
    group, table = group_of(recipe, layout, layers, rank, experts=experts), table_of(recipe)

    def most(muon: bool) -> int:
        def numbers(runs: list[Run]) -> int:
            return sum(run.numbers for run in runs if by_muon(run, table) == muon)

        return max(map(numbers, group.runs))

    return GroupUpdate(group, rounds_of(group.plan) if group.plan else [], most(True), most(False))


def _exchange_bytes(recipe: Recipe, part: GroupUpdate) -> int:
    """Return the most bytes that a member has of an exchange: its buffers, or before them a float32 copy of a momentum
    that is held in BF16."""
    group, muon, table = part.group, recipe.optim.muon, table_of(recipe)
    if group.plan is None:
        return 0
    low, alone, size = recipe.precision.moments == "bf16", len(group.members) == 1, size_of_number(recipe)
    mixing = (8 if low else 4) if muon.nesterov else 0
    most = max(most_bytes(each, steps=muon.steps, size=size, mixing=mixing, alone=alone) for each in part.rounds)
    copied = (4 * run.numbers for runs in group.runs for run in runs if by_muon(run, table))
    return max(most, *copied) if low else most
