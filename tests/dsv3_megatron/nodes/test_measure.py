"""Measurements between real ranks, two to a node that is none; and what a node sees."""

import time

import pytest
import torch

from dsv3_megatron.nodes import measure
from dsv3_megatron.nodes.measure import Place, clock_seconds, message_speed, product_tflops
from dsv3_megatron.nodes.seen import code_digest, data_digest, missing_paths
from launcher.command_line.recipe_files import ROOT
from parallel.groups import start_processes, stop_processes
from parallel.world import World
from testing.ranks import run_ranks
from testing.training.tiny import small_recipe

AHEAD = {0: 0.0, 1: 7.0}  # seconds, by node


def measured(local_size):
    """Measure on this rank, whose node's clock is ahead of others'."""
    world, device = World.from_environment(), torch.device("cpu")
    start_processes(world, device, timeout_seconds=120)
    real = time.time
    try:
        place = Place(world.rank, world.size, local_size)
        measure.time.time = lambda: real() + AHEAD[place.node]
        return {
            "tflops": product_tflops(device),
            "within": message_speed(place, device, within=True),
            "between": message_speed(place, device, within=False),
            "clock": clock_seconds(place),
        }
    finally:
        measure.time.time = real
        stop_processes()


def test_four_ranks_of_two_nodes_measure_products_messages_and_clocks():
    two_nodes, one_node = run_ranks(4, measured, [2, 4])
    assert all(0 < rank["tflops"] < 10 for rank in (*two_nodes, *one_node))
    assert all(rank["within"] > 0 for rank in (*two_nodes, *one_node))
    assert all(rank["between"] > 0 for rank in two_nodes)
    assert [rank["between"] for rank in one_node] == [None] * 4
    assert [rank["clock"] for rank in two_nodes] == [0.0, 0.0, pytest.approx(7.0, abs=0.5), 0.0]


@pytest.mark.parametrize(("size", "local"), [(1, 1), (8, 8), (16, 8), (6, 2)])
def test_every_rank_has_one_before_it_and_one_after_it_on_both_rings(size, local):
    places = [Place(rank, size, local) for rank in range(size)]
    for within in (True, False):
        for place in places:
            before, after = place.neighbours(within=within)
            assert places[after].neighbours(within=within)[0] == place.rank
            assert places[before].neighbours(within=within)[1] == place.rank
            same = (places[after].node, places[after].local_rank)
            assert same[0] == place.node if within else same[1] == place.local_rank


def test_a_node_says_which_paths_it_does_not_see(tmp_path):
    assert missing_paths(small_recipe()) == []
    gone = tmp_path / "gone"
    named = {"data.tokenizer": gone, "checkpoint.load": gone, "run.start_from": gone, "evaluate.tasks": f"[{gone}]"}
    recipe = small_recipe("data.source=indexed", "data.path=x", *(f"{key}={value}" for key, value in named.items()))
    assert missing_paths(recipe) == [f"{key} = {gone} is not there" for key in named]
    assert data_digest(small_recipe()) == (None, None)
    recipe = small_recipe("data.source=indexed", f"data.path={gone}")
    assert data_digest(recipe) == (None, f"data.path = {gone} is not there as shards (No such file or directory)")


def test_the_digest_of_the_code_changes_with_any_module(tmp_path):
    for name in ("parallel/a.py", "dsv3_megatron/model/b.py", "launcher/c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    before = code_digest(tmp_path)
    assert before == code_digest(tmp_path) != code_digest(ROOT)
    (tmp_path / "dsv3_megatron/model/b.py").write_text("x = 2\n")
    assert code_digest(tmp_path) != before
