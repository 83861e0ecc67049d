"""What the plan advises is true: with the overrides that it names, the plan is what it says."""

import re

import pytest

from dsv3_megatron.planning.advice import advice
from dsv3_megatron.planning.memory.formulae import estimate_stages
from dsv3_megatron.planning.plan import make_plan
from dsv3_megatron.preflight.layout import world_of
from launcher.command_line.compose import compose

CASES = {
    "one is enough": "recipe=dsv3_16b optim.micro_batch=4",
    "two together": "recipe=dsv3_16b cluster.memory=36GiB",
    "frozen": "recipe=moonlight_16b cluster=h200_1 parallel=single",
    "spare": "recipe=moonlight_16b",
}


def plan_of(words):
    recipe = compose(words.split())
    return make_plan(recipe, world_of(recipe), measure=estimate_stages)


def overrides(line):
    return re.findall(r"[\w.]+=\[?[\w,]+\]?", line)


@pytest.mark.parametrize("case", CASES)
def test_the_advice_holds(case):
    plan = plan_of(CASES[case])
    lines = advice(plan)
    assert lines and plan.fits == (case == "spare")
    for line in lines:
        there = plan_of(" ".join([CASES[case], *overrides(line)]))
        if not plan.fits:
            assert there.fits == ("fits" in line or "make it fit" in line), line
        if saved := re.search(r"saves ([\d.]+) GiB", line):
            assert (plan.tightest.total_bytes - there.tightest.total_bytes) / 2**30 == pytest.approx(
                float(saved[1]), abs=0.06
            )
    assert any("and it fits" in line for line in lines) == (case in ("one is enough", "frozen"))
    assert any("model.freeze=[experts] " in line for line in lines) == (case == "frozen")
    assert any("together" in line for line in lines) == (case == "two together")


def test_where_nothing_makes_it_fit_that_is_said():
    lines = advice(plan_of("recipe=dsv3_16b cluster=h100_1 parallel=single"))
    assert "too much: take more GPUs" in lines[-1]
