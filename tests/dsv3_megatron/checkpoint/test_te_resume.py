"""A run on the te backend that is stopped and resumed is, bit for bit, the run that was not stopped."""

import json
import os

import pytest

import dsv3_megatron.trainer as trainer_module
from launcher.compose import compose, resolved_yaml
from parallel.world import World
from tests.ranks import TE, run_ranks
from tests.te import FP8, WORDS
from tests.tiny import SMALL

HELD = "precision.fp8.hold_weights=true"
TENSOR = tuple(f"precision.fp8.{role}_tile=tensor" for role in ("activation", "weight", "gradient"))
SETTINGS = {
    "bf16": (*WORDS, "precision=bf16"),
    "fp8": FP8,
    "held": (*FP8, HELD),
    "held, float32 moments": (*FP8, HELD, "precision.moments=fp32"),
    "delayed": (*FP8, *TENSOR, "precision.fp8.scaling=delayed", "precision.fp8.swiglu_cache=high"),
}
STEPS = 4


class Silent:
    """A reporter of a run that nobody watches."""

    def __getattr__(self, name):
        return lambda *a, **k: None


def run(overrides):
    """Train a recipe as launcher/pretrain.py does."""
    os.environ["NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"] = "1"  # TE's amaxes of delayed scaling
    recipe = compose([*SMALL, "run.name=te", f"run.steps={STEPS}", *overrides])
    trainer_module.run(recipe, World.from_environment(), Silent(), resolved_yaml(recipe))


def measured(directory):
    """Return what every step measured that has no time in it; a step done twice counts as it was done last."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["lm_loss"], line["grad_norm"]) for line in lines}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Per setting (measured without a stop, measured with one): stopped before the first step and after two."""
    place = tmp_path_factory.mktemp("te")
    cases = []
    for number, words in enumerate(SETTINGS.values()):
        whole, stopped = f"run.directory={place / f'whole{number}'}", f"run.directory={place / f'stopped{number}'}"
        cases += [(*words, whole), (*words, stopped, "run.steps=2"), (*words, stopped)]
    run_ranks(2, run, [(*words, "parallel.expert=2") for words in cases], preload=TE)
    return {
        name: (measured(place / f"whole{number}"), measured(place / f"stopped{number}"))
        for number, name in enumerate(SETTINGS)
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_run_is_the_run_that_was_not_stopped(runs, name):
    whole, resumed = runs[name]
    assert sorted(whole) == list(range(1, STEPS + 1))
    assert resumed == whole
