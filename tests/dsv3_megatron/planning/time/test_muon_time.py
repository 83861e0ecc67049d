"""Muon's end of a step: what is worked, sent and waited for, by hand on small groups, and what must follow from it."""

from itertools import pairwise

import pytest

from dsv3_megatron.optim.newton_schulz import products
from dsv3_megatron.optim.spread import Box, Holding, make_plan
from dsv3_megatron.planning.memory.formulae import estimate_stages
from dsv3_megatron.planning.plan import make_plan as plan_run
from dsv3_megatron.planning.time.muon import RoundTraffic, newton_schulz_seconds
from dsv3_megatron.planning.time.roofline import Device
from dsv3_megatron.settings import ClusterSettings
from launcher.command_line.compose import compose
from launcher.views.plan import text_of
from parallel.links import Fabric, Link

H800 = ClusterSettings(name="h", sms=132, memory_terabytes_per_second=3.35, peak_tflops={"fp32": 67, "bf16": 989.5})


def planned(*words, world=None):
    """Return the plan of a recipe by the formulae."""
    recipe = compose(list(words))
    return plan_run(recipe, world or recipe.cluster.world_size, measure=estimate_stages)


def test_newton_schulz_takes_its_products_below_the_peak():
    one = newton_schulz_seconds(Device(H800), [(4, 2048, 7168)], 5, "bf16")
    at_the_peak = 4 * products(2048, 7168, 5) / 989.5e12
    assert at_the_peak / 0.9 < one < at_the_peak / 0.5
    assert newton_schulz_seconds(Device(H800), [(4, 7168, 2048)], 5, "bf16") == one  # tall or wide
    assert newton_schulz_seconds(Device(H800), [(4, 2048, 7168)], 5, "fp32") > 10 * one
    steps = [newton_schulz_seconds(Device(H800), [(1, 512, 512)], n, "bf16") for n in (1, 2, 3)]
    assert len({round(b - a, 12) for a, b in pairwise(steps)}) == 1


def test_bytes_of_every_round_go_over_their_links():
    """Three ranks, two of them on a node; a matrix lies on all, and its owner, who holds most, is on the first node."""
    shapes = {"a": (4, 100)}
    holdings = [
        Holding((Box("a", 0, 2, 0, 100),)),
        Holding((Box("a", 2, 1, 0, 100),)),
        Holding((Box("a", 3, 1, 0, 100),)),
    ]
    plan = make_plan(shapes, holdings)
    assert plan.owner == {"a": 0}
    fabric = Fabric(2, Link(1e3, 0.5), Link(1e2, 2.0))
    traffic = RoundTraffic(plan, (0, 1, 2), fabric, size=2)
    # 200 bytes come from the neighbour and 200 over the slower link; as many go back.
    assert traffic.gather_seconds == traffic.return_seconds == [pytest.approx(2.0 + 200 / 1e2)]
    gathered, returned = traffic.most()
    assert (gathered.intra_bytes, gathered.inter_bytes) == (0, 0)  # the owner's own stay
    assert (returned.intra_bytes, returned.inter_bytes) == (200, 200)


def test_the_whole_model_holds_less_and_its_update_takes_longer():
    adamw, muon = planned("recipe=dsv3_671b"), planned("recipe=dsv3_671b", "optim.name=muon")
    for a, m in zip(adamw.ranks, muon.ranks):
        assert 0.7 * a.optimizer_bytes < m.optimizer_bytes < 0.8 * a.optimizer_bytes  # 6 bytes of a number for 8
        assert m.update_bytes > 0 and m.total_bytes < a.total_bytes
    update = muon.step.muon
    assert update.seconds == pytest.approx(update.work_seconds + update.waiting_seconds + update.memory_seconds)
    assert 0 < update.waiting_seconds <= update.exchange_seconds
    assert muon.step.optimizer_seconds > adamw.step.optimizer_seconds
    assert muon.step.seconds < 1.01 * adamw.step.seconds
    assert adamw.step.muon is None and adamw.as_json()["step"]["muon"] is None
    rows = set(muon.traffic()) - set(adamw.traffic())
    assert rows == {"Muon, matrices to owners", "Muon, updates back"}
    assert muon.as_json()["step"]["muon"]["update_seconds"] == update.seconds


def test_where_nothing_is_divided_nothing_travels():
    update = planned("recipe=dsv3_one_gpu", "optim.name=muon", world=1).step.muon
    assert update.exchange_seconds == update.waiting_seconds == 0
    assert update.work_seconds > 0


def test_a_step_of_few_tokens_may_be_fullest_while_it_updates():
    words = ("recipe=dsv3_one_gpu", "optim.name=muon", "data.sequence_length=64", "optim.micro_batch=1")
    (rank,) = planned(*words, world=1).ranks
    assert rank.update_bytes > rank.moving_bytes and rank.fullest_action == "the optimizer's update"
    held = rank.weights_bytes + rank.fp8_weights_bytes + rank.gradients_bytes + rank.optimizer_bytes
    assert rank.total_bytes == held + rank.update_bytes + rank.reserved_bytes


def test_float32_costs_more_than_bf16():
    words = ("recipe=moonlight_16b", "optim.name=muon")
    bf16, fp32 = (planned(*words, f"optim.muon.arithmetic={form}").step.muon for form in ("bf16", "fp32"))
    assert fp32.work_seconds > 10 * bf16.work_seconds
    assert fp32.returned.intra_bytes == 2 * bf16.returned.intra_bytes


def test_a_price_that_is_none_says_so():
    words = ["recipe=moonlight_16b", "optim.name=muon", "optim.muon.arithmetic=fp32"]
    known = compose(words)
    unknown = known.model_copy(update={"cluster": known.cluster.model_copy(update={"peak_tflops": {"bf16": 989.5}})})
    priced, unpriced = (
        "\n".join(text_of(plan_run(recipe, 8, measure=estimate_stages), advise=False)) for recipe in (known, unknown)
    )
    line = "too short: cluster=h100_8 gives no peak_tflops.fp32 for optim.muon.arithmetic = fp32"
    assert line in unpriced and line not in priced
    assert "Newton-Schulz" in priced and "while Muon updates, activations are gone" in priced
