"""What the plan says of failures and saves, what checkpoint.every_minutes=auto takes, and where it is refused."""

import json
import re
from math import inf

import pytest

from dsv3_megatron.checkpoint.settings import CheckpointSettings
from dsv3_megatron.planning.goodput.expected import (
    planned_minutes,
    steps_in,
    with_planned_interval,
)
from dsv3_megatron.planning.memory.formulae import estimate_stages
from dsv3_megatron.planning.plan import make_plan
from launcher.command_line.compose import compose
from launcher.pretrain import _of_interval
from launcher.views.plan import text_of
from parallel.errors import RecipeError
from parallel.world import World


def plan_of(*words):
    recipe = compose(list(words))
    return make_plan(recipe, recipe.cluster.world_size or 1, measure=estimate_stages)


@pytest.fixture(scope="module")
def paper():
    return plan_of("recipe=dsv3_671b")


def test_the_671b_on_its_cluster_fails_once_a_day_and_the_table_says_what_that_costs(paper):
    found = paper.goodput
    assert found.failures_per_day == pytest.approx(2048 * 4.7e-4)
    assert found.checkpoint_bytes == pytest.approx(14 * paper.parameters.trained, rel=1e-6)  # and router biases
    told = "\n".join(text_of(paper, advise=False))
    assert "failures        0.96 a day on 2,048 GPUs (cluster.failures_per_gpu_day = 0.00047)" in told
    assert f"useful {found.share:.1%} of the time; {found.best_share:.1%} with the best interval" in told
    for said in (
        "has one every 33 steps, which take 10m 3s; best is every 8 steps, which take 2m 26s",
        "300 s until it is noticed at the latest",
        "takes 250 GB/s",
    ):
        assert said in told
    assert (round(found.share, 3), round(found.best_share, 3)) == (0.989, 0.991)  # the recipe's comment


def test_plan_json_holds_every_assumption_with_its_value_and_no_infinity(paper):
    stored = json.loads(json.dumps(paper.as_json()["goodput"], allow_nan=False))
    assert stored["not_planned"] is None and stored["useful_share"] == paper.goodput.share
    assert stored["assumptions"] == {
        "cluster.failures_per_gpu_day": 4.7e-4,
        "cluster.storage_gigabytes_per_second": 250.0,
        "cluster.host_gigabytes_per_second": 50.0,
        "cluster.start_seconds": 300.0,
        "run.abort_seconds": 300.0,
        "load_seconds": pytest.approx(stored["checkpoint_bytes"] / 250e9),
    }
    disk = stored["saves"]["disk"]
    assert disk["stall_seconds"] == pytest.approx(stored["largest_rank_bytes"] / 50e9)
    assert disk["seconds"] == pytest.approx(disk["stall_seconds"] + stored["assumptions"]["load_seconds"])
    assert disk["recovery_seconds"] == pytest.approx(600 + stored["assumptions"]["load_seconds"])
    assert (disk["interval_steps"], disk["best_interval_steps"]) == (33, 8)


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        (("checkpoint.every_minutes=0", "checkpoint.every_steps=500"), lambda step, best, run: 500 * step),
        (("checkpoint.every_minutes=60", "checkpoint.every_steps=500"), lambda step, best, run: 3600),
        (("checkpoint.every_minutes=auto", "checkpoint.every_steps=500"), lambda step, best, run: best),
        (("checkpoint.every_minutes=0",), lambda step, best, run: run),
    ],
)
def test_the_recipes_own_interval_is_what_comes_first(words, seconds):
    plan = plan_of("recipe=dsv3_671b", *words)
    [disk] = plan.goodput.saves
    step = plan.priced_step.seconds
    wanted = seconds(step, disk.best_seconds, plan.run_seconds)
    assert wanted <= disk.planned_seconds < wanted + step + disk.costs.stall_seconds
    assert plan.goodput.share <= plan.goodput.best_share + 1e-12


def test_states_in_memory_serve_most_failures_and_let_the_disk_be_written_seldom():
    plain, kept = (plan_of("recipe=dsv3_671b", f"checkpoint.memory_every_steps={n}").goodput for n in (0, 15))
    memory, disk = kept.saves
    assert (memory.name, disk.name) == ("memory", "disk")
    assert memory.costs.share + disk.costs.share == 1 and memory.costs.share == kept.assumptions["memory_survives"]
    assert kept.steps(memory.planned_seconds) == 15
    assert memory.costs.recovery_seconds < disk.costs.recovery_seconds
    assert disk.best_seconds > 3 * plain.saves[0].best_seconds
    assert plain.share < kept.share <= kept.best_share
    assert "memory_survives" not in plain.assumptions
    told = "\n".join(text_of(plan_of("recipe=dsv3_671b", "checkpoint.memory_every_steps=15"), advise=False))
    assert "a save to memory stops training for 0.10 s" in told and "a save to disk" in told
    assert "memory serves 95% of the failures" in told


def test_a_save_that_training_waits_for_stalls_it_as_long_as_it_takes_and_comes_less_often():
    beside, waiting = (
        plan_of("recipe=dsv3_671b", f"checkpoint.asynchronous={value}").goodput.saves[0] for value in ("true", "false")
    )
    assert waiting.costs.stall_seconds == waiting.costs.seconds == beside.costs.seconds
    assert waiting.best_seconds > beside.best_seconds


def test_where_nothing_fails_saves_are_never_best_and_plan_json_says_null():
    plan = plan_of("recipe=dsv3_671b", "cluster.failures_per_gpu_day=0")
    assert plan.goodput.saves[0].best_seconds == inf and plan.goodput.best_share == 1.0
    assert plan.as_json()["goodput"]["saves"]["disk"]["best_interval_seconds"] is None
    assert "best is never" in "\n".join(text_of(plan, advise=False))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("recipe=dsv3_tiny",), "cluster=local has no GPUs"),
        (("recipe=dsv3_1b",), "cluster=h100_8 gives no storage_gigabytes_per_second"),
        (("recipe=dsv3_671b", "run.abort_seconds=null"), "run.abort_seconds = null ends no run that hangs"),
        (("recipe=dsv3_671b", "cluster.sms=0"), "cluster=h800_2048 gives no sms"),
    ],
)
def test_a_fact_that_lacks_is_named_and_every_key_is_null(words, why, paper):
    plan = plan_of(*words)
    stored = plan.as_json()["goodput"]
    assert stored.keys() == paper.as_json()["goodput"].keys()
    assert stored.pop("not_planned") == why and set(stored.values()) == {None}
    assert f"failures        not planned: {why}" in text_of(plan, advise=False)


def test_auto_is_the_plans_interval_the_same_at_every_start():
    recipe = compose(["recipe=dsv3_671b", "checkpoint.every_minutes=auto"])
    layout = recipe.layout(2048)
    planned = with_planned_interval(recipe, layout)
    minutes = planned.checkpoint.every_minutes
    assert minutes == with_planned_interval(recipe, layout).checkpoint.every_minutes == planned_minutes(recipe, layout)
    [disk] = plan_of("recipe=dsv3_671b").goodput.saves
    step = plan_of("recipe=dsv3_671b").priced_step.seconds
    assert steps_in(planned.checkpoint.interval_seconds - disk.costs.stall_seconds, step) == 8
    assert with_planned_interval(planned, layout) is planned
    assert _of_interval(planned, World(0, 2048, 0)) == (
        f"checkpoint.every_minutes = auto: {minutes:g} minutes between saves, planned for 2,048 GPUs"
    )
    with pytest.raises(AssertionError, match="planned interval"):
        CheckpointSettings(every_minutes="auto").interval_seconds  # noqa: B018


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("recipe=dsv3_tiny",), "cluster=local has no GPUs, whose failures it is planned from"),
        (("recipe=dsv3_1b",), "cluster=h100_8 gives no storage_gigabytes_per_second"),
        (
            ("recipe=dsv3_671b", "cluster.failures_per_gpu_day=0"),
            "cluster.failures_per_gpu_day = 0, where nothing fails",
        ),
    ],
)
def test_auto_is_refused_where_it_cannot_be_planned(words, why):
    line = f"checkpoint.every_minutes = auto cannot be planned: {why}; write minutes instead"
    with pytest.raises(RecipeError, match=re.escape(line)):
        compose([*words, "checkpoint.every_minutes=auto"])
