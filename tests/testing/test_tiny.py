"""The small recipe that most tests train is what Hydra composes of the same words."""

import pytest

import testing.training.tiny as tiny
from launcher.command_line.compose import compose
from parallel.errors import RecipeError
from testing.training.tiny import SMALL, small_recipe

WORDS = {
    "nothing": (),
    "keys that files set": ("model.num_hidden_layers=2", "optim.global_batch=16", "run.steps=3"),
    "a key that no file mentions": (
        "parallel.recompute=[norm,mla_up]",
        "optim.ema_decay=0.5",
        "health.skip_sigma=null",
    ),
    "an interpolation of the root": ("run.name=other",),
    "phases": ("optim.global_batch=[{until: 128, shape: linear, at: 4, to: 8}]", "run.steps=9"),
    "weights": ("data.weights={a: 0.25, b: 0.75}", "run.directory='/tmp/a b'"),
    "the last word counts": ("run.steps=3", "run.steps=4"),
    "a group": ("data=stdlib", "precision=fp8", "model.vocab_size=512"),
    "a prefix": ("+health.skip_limit=2",),
}


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_it_is_what_hydra_composes(words):
    assert small_recipe(*words) == compose([*SMALL, *words])


def test_only_other_files_are_composed(monkeypatch):
    small_recipe()
    monkeypatch.setattr(tiny, "compose", None)
    assert small_recipe("run.steps=7").run.steps == 7
    assert small_recipe().run.steps != 7, "one call leaves nothing to the next"


def test_a_mistake_is_refused():
    with pytest.raises(RecipeError, match=r"run\.stebs is not a key of a recipe"):
        small_recipe("run.stebs=3")
