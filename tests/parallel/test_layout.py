"""Layouts: groups partition the world and equal slices of a grid."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.command_line.compose import compose
from parallel.errors import LayoutError
from parallel.layout import GROUPS, Layout, nearest_divisors
from parallel.settings import ParallelSettings
from testing.lanes import examples

small = st.sampled_from([1, 2, 3, 4])


@st.composite
def layouts(draw):
    """Layouts whose dense and expert degrees fill the same stage."""
    tp, cp, pp, ep, expert_tp = (draw(small) for _ in range(5))
    world = pp * np.lcm(tp * cp, ep * expert_tp) * draw(small)
    settings = ParallelSettings(tensor=tp, context=cp, pipeline=pp, expert=ep, expert_tensor=expert_tp)
    return Layout.of(settings, int(world))


def slow_groups(layout, name):
    """Return the groups as slices of a numpy grid: the axes inside moved last, the others flattened."""
    inside = GROUPS[name]
    expert = any(axis in ("ep", "expert_tp", "expert_dp") for axis in inside)
    axes = ["pp", "expert_dp", "ep", "expert_tp"] if expert else ["pp", "dp", "cp", "tp"]
    grid = np.arange(layout.world_size).reshape([getattr(layout, axis) for axis in axes])
    order = [i for i, a in enumerate(axes) if a not in inside] + [i for i, a in enumerate(axes) if a in inside]
    size = int(np.prod([getattr(layout, axis) for axis in inside]))
    return {tuple(map(int, row)) for row in grid.transpose(order).reshape(-1, size)}


@settings(deadline=None, max_examples=examples(60))
@given(layouts(), st.sampled_from(sorted(GROUPS)))
def test_groups_partition_the_world_and_equal_slices_of_a_grid(layout, name):
    groups = layout.groups(name)
    assert sorted(rank for members in groups for rank in members) == list(range(layout.world_size))
    assert set(groups) == slow_groups(layout, name)


@settings(deadline=None, max_examples=examples(60))
@given(layouts(), st.data())
def test_a_group_holds_the_ranks_that_agree_on_all_other_axes(layout, data):
    rank = data.draw(st.integers(0, layout.world_size - 1))
    name = data.draw(st.sampled_from(sorted(GROUPS)))
    mine = layout.coordinates(rank)
    for other in layout.group(name, rank):
        theirs = layout.coordinates(other)
        of_experts = {"expert_dp", "ep", "expert_tp"} & set(GROUPS[name])
        axes = ("pp", "expert_dp", "ep", "expert_tp") if of_experts else ("pp", "dp", "cp", "tp")
        assert all(theirs[a] == mine[a] for a in axes if a not in GROUPS[name])


def test_the_papers_layout_on_2048_ranks():
    layout = compose(["recipe=dsv3_671b"]).layout(2048)
    assert (layout.pp, layout.ep, layout.dp, layout.expert_dp, layout.tp) == (16, 64, 128, 2, 1)
    assert layout.group("ep", 100) == tuple(range(64, 128))
    assert layout.group("expert_dp", 100) == (36, 100)
    assert layout.group("pp", 5) == tuple(range(5, 2048, 128))


def test_a_rank_outside_the_world_is_refused():
    with pytest.raises(LayoutError, match="rank 8 is not in a world of 8"):
        Layout(dp=8, expert_dp=8).coordinates(8)


@pytest.mark.parametrize(("number", "wanted", "text"), [(256, 48, "32, 64"), (16, 3, "2, 4"), (7, 7, "1, 7")])
def test_nearest_divisors_are_offered(number, wanted, text):
    assert nearest_divisors(number, wanted) == text


def test_a_mirrored_group_unites_a_stage_with_the_one_at_the_other_end():
    layout = Layout.of(ParallelSettings(pipeline=4, expert=2), 16)
    assert layout.group("dp", 5) == (4, 5, 6, 7)
    assert layout.mirrored(layout.group("dp", 5)) == (4, 5, 6, 7, 8, 9, 10, 11)
    assert layout.mirrored(layout.group("expert_dp", 1)) == (1, 3, 13, 15)
