"""Which host is named for what, from facts alone."""

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.nodes.facts import RankFacts
from dsv3_megatron.nodes.judge import CLOCK_SECONDS, judge

NODES, LOCAL = 4, 8


def facts(**changes):
    """Return facts of 4 nodes of 8 GPUs that differ by a few percent; ``changes``: "r<rank>" -> fields."""
    dice = random.Random(7)
    found = []
    for rank in range(NODES * LOCAL):
        node = rank // LOCAL
        usual = RankFacts(
            rank=rank,
            node=node,
            local_rank=rank % LOCAL,
            host=f"node{node}",
            device="NVIDIA H100",
            tflops=700 * dice.uniform(0.96, 1.04),
            within=300 * dice.uniform(0.95, 1.05),
            between=44 * dice.uniform(0.9, 1.1),
            clock_seconds=dice.uniform(-0.01, 0.01),
            digests={} if rank % LOCAL else {"code": "a", "recipe": "b"},
        )
        found.append(dataclasses.replace(usual, **changes.get(f"r{rank}", {})))
    return found


def said(found):
    return [(finding.host, finding.said, finding.unfit) for finding in judge(found)]


def test_nodes_that_are_alike_are_fit():
    assert said(facts()) == []


def test_a_slow_gpu_is_named_and_may_start():
    ((host, text, unfit),) = said(facts(r19={"tflops": 350.0}))
    assert host == "node2" and text.startswith("GPU 3 multiplies matrices at 350 TFLOP/s, 5") and not unfit


def test_a_port_that_has_fallen_back_is_named_once_a_host():
    slow = {f"r{rank}": {"between": 11.0} for rank in (8, 12, 15)} | {"r9": {"between": 5.0}}
    ((host, text, unfit),) = said(facts(**slow))
    assert host == "node1" and not unfit
    assert text.startswith("messages of GPU 1 to the next node pass at 5 GB/s, 1") and text.endswith(
        "3 more of its ranks"
    )


def test_what_is_wrong_comes_first_and_is_unfit():
    lines = said(facts(r0={"tflops": 10.0}, r24={"problems": ("has 7 GPUs, and should have 8",)}))
    assert lines[0] == ("node3", "has 7 GPUs, and should have 8", True)
    assert [unfit for *_, unfit in lines] == [True, False]


@pytest.mark.parametrize("name", ["code", "recipe"])
def test_the_host_with_other_code_than_most_is_named(name):
    other = {"code": "a", "recipe": "b"} | {name: "other"}
    assert said(facts(r16={"digests": other})) == [("node2", f"has another {name} than 3 of 4 nodes have", True)]
    # of two halves the one without rank 0
    halves = said(facts(r16={"digests": other}, r24={"digests": other}))
    assert [host for host, *_ in halves] == ["node2", "node3"]
    # and rank 0's, where all others have the same
    alone = said(facts(r0={"digests": other}))
    assert alone == [("node0", f"has another {name} than 3 of 4 nodes have", True)]


@pytest.mark.parametrize(("seconds", "text"), [(3.0, "its clock is 3.0 s ahead of the others"), (-90, "90.0 s behind")])
def test_a_clock_is_compared_with_most_others(seconds, text):
    ((host, found, unfit),) = said(facts(r8={"clock_seconds": seconds}))
    assert host == "node1" and text in found and not unfit
    # Rank 0's own clock is wrong: all others differ from it alike, and it is named.
    all_others = {f"r{LOCAL * node}": {"clock_seconds": -5.0} for node in (1, 2, 3)}
    ((host, found, _),) = said(facts(**all_others))
    assert host == "node0" and "5.0 s ahead" in found


@pytest.mark.parametrize("ranks", [1, 3])
def test_few_ranks_are_compared_with_nothing(ranks):
    few = [dataclasses.replace(each, tflops=1.0 + each.rank, within=1.0 + each.rank) for each in facts()[:ranks]]
    assert judge(few) == []


@given(st.permutations(range(NODES * LOCAL)), st.floats(-CLOCK_SECONDS / 3, CLOCK_SECONDS / 3))
def test_neither_order_nor_a_common_shift_of_clocks_matters(order, shift):
    found = facts(r5={"tflops": 100.0}, r24={"clock_seconds": 60.0})
    moved = [dataclasses.replace(found[n], clock_seconds=found[n].clock_seconds + shift) for n in order]
    assert [str(each) for each in judge(moved)] == [str(each) for each in judge(found)]
