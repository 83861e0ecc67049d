"""Bytes of optimizer states of every rank that holds a pipeline rank's stages, exactly.

Shards are padded, and Muon keeps less of a matrix than AdamW of a vector, so that no two ranks need hold alike.
"""

from __future__ import annotations

from collections.abc import Iterator

from dsv3_megatron.optim.matrices import Rule
from dsv3_megatron.planning.memory.ranks import bytes_of_number
from dsv3_megatron.planning.update.holdings import Group, by_muon, table_of
from dsv3_megatron.planning.update.runs import Run
from dsv3_megatron.recipe import Recipe
from parallel.layout import Layout


def state_bytes(recipe: Recipe, runs: list[Run], table: tuple[Rule, ...]) -> int:
    """Return the bytes of the states of what a rank updates."""
    return sum(run.numbers * bytes_of_number(recipe, moments=1 if by_muon(run, table) else 2) for run in runs)


def state_bytes_of_ranks(recipe: Recipe, layout: Layout, pipeline_rank: int, dense: Group, experts: Group) -> list[int]:
    """Return the bytes of the states of every rank of a pipeline rank, by number in it.

    Args:
        dense, experts: its groups, whoever's experts: those of all are of one size.
    """
    table = table_of(recipe)
    of_dense = [state_bytes(recipe, runs, table) for runs in dense.runs]
    of_experts = [state_bytes(recipe, runs, table) for runs in experts.runs]
    return [of_dense[d] + of_experts[e] for d, e in data_ranks(layout, pipeline_rank, dense, experts)]


def data_ranks(layout: Layout, pipeline_rank: int, dense: Group, experts: Group) -> Iterator[tuple[int, int]]:
    """Yield, of every rank of a pipeline rank, its number among those that divide the dense parameters, and among those
    that divide its experts. Where two pipeline ranks hold the same stages, they divide them together."""
    stage = layout.world_size // layout.pp
    second = 2 * pipeline_rank >= layout.pp and len(dense.runs) > layout.dp * layout.cp
    for rank in range(stage):
        yield (
            second * layout.dp * layout.cp + rank // layout.tp,
            second * layout.expert_dp + rank // (layout.expert_tp * layout.ep),
        )
