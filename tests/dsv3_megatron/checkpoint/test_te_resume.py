"""A run on the te backend that is stopped and resumed is, bit for bit, the run that was not stopped."""

import pytest
import torch

import dsv3_megatron.train.run as run_module
from dsv3_megatron.checkpoint.state import prepare_moments
from dsv3_megatron.train.build import build_parts
from launcher.command_line.compose import resolved_yaml
from parallel.groups import start_processes, stop_processes
from parallel.world import World
from testing.lanes import InLanes, names_in_lanes
from testing.ranks import TE, run_ranks
from testing.training.on_te import FP8, WORDS, forget_fp8_state
from testing.training.tiny import small_recipe
from testing.training.whole_runs import steps

HELD = "precision.fp8.hold_weights=true"
TENSOR = tuple(f"precision.fp8.{role}_tile=tensor" for role in ("activation", "weight", "gradient"))
SETTINGS = {
    "bf16": (*WORDS, "precision=bf16"),
    "fp8": FP8,
    "held": (*FP8, HELD),
    "held, float32 moments": (*FP8, HELD, "precision.moments=fp32"),
    "delayed": (*FP8, *TENSOR, "precision.fp8.scaling=delayed", "precision.fp8.swiglu_cache=high"),
}
STEPS = 3
FAST = ()  # the fast lane resumes on the torch backend


class Silent:
    """A reporter of a run that nobody watches."""

    def __getattr__(self, name):
        return lambda *a, **k: None


def run(overrides):
    """Train a recipe as launcher/pretrain.py does."""
    recipe = small_recipe("run.name=te", f"run.steps={STEPS}", *overrides)
    try:
        run_module.run(recipe, World.from_environment(), Silent(), resolved_yaml(recipe))
    finally:
        forget_fp8_state()


def measured(directory):
    """Return what every step measured that has no time in it; a step done twice counts as it was done last."""
    return {line["step"]: (line["lm_loss"], line["grad_norm"]) for line in steps(directory)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Per setting (measured without a stop, measured with one): stopped after the first."""

    def measure(settings):
        place, cases = tmp_path_factory.mktemp("te"), []
        for number, words in enumerate(settings.values()):
            whole, stopped = f"run.directory={place / f'whole{number}'}", f"run.directory={place / f'stopped{number}'}"
            cases += [(*words, whole), (*words, stopped, "run.steps=1"), (*words, stopped)]
        run_ranks(2, run, [(*words, "parallel.expert=2") for words in cases], preload=TE)
        for number in range(len(settings)):
            yield measured(place / f"whole{number}"), measured(place / f"stopped{number}")

    return InLanes(SETTINGS, measure, *FAST)


@pytest.mark.parametrize("name", names_in_lanes(SETTINGS, *FAST))
def test_a_resumed_run_is_the_run_that_was_not_stopped(runs, name):
    whole, resumed = runs[name]
    assert sorted(whole) == list(range(1, STEPS + 1))
    assert resumed == whole


def moments_before_the_first_step(words):
    """Return the formats and the largest numbers of the moments that a save before the first step would hold."""
    recipe = small_recipe(*words)
    start_processes(World.from_environment(), torch.device("cpu"))
    try:
        parts = build_parts(recipe, recipe.layout(1), torch.device("cpu"))
        prepare_moments(parts.optimizer)
        states = [s for part in parts.optimizer.chained_optimizers for s in part.optimizer.state.values()]
        found = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
        return {(str(moment.dtype), moment.abs().max().item()) for moment in found}
    finally:
        stop_processes()


def test_a_save_before_the_first_step_holds_moments_of_zero():
    cases = [SETTINGS["bf16"], SETTINGS["held"], SETTINGS["held, float32 moments"], WORDS]
    found = [found for (found,) in run_ranks(1, moments_before_the_first_step, cases, preload=TE)]
    assert found == [{("torch.bfloat16", 0.0)}] * 2 + [{("torch.float32", 0.0)}] * 2
