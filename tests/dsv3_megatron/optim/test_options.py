"""What a recipe says of AdamW is what it does, in a new run and after a resume from a run with something else."""

import numpy as np
import pytest

from testing.ranks import TE, run_ranks
from testing.training.lives import Life, live
from testing.training.on_te import WORDS
from testing.training.tiny import VALUES

BACKENDS = {"torch": (*WORDS, "backend=torch"), "te": WORDS}
CHANGES = {
    "nothing": (),
    "weight decay": ("optim.weight_decay=10.1",),
    "betas": ("optim.betas=[0.5,0.6]",),
    "epsilon": ("optim.epsilon=0.01",),
}


@pytest.fixture(scope="module", params=BACKENDS)
def weights(request, tmp_path_factory):
    """Weights by run, start and change: before a step and after it, of a new run and of one that is resumed."""
    folder, words = tmp_path_factory.mktemp("options") / "checkpoints", BACKENDS[request.param]
    starts = {"new": {}, "resumed": {"first": 2, "load": folder / "step_00000002"}}
    cases = {"saved": Life(words, save=folder)}
    for start, given in starts.items():
        cases[start, "before"] = Life(words, **given, steps=0)
        cases |= {(start, name): Life((*words, *change), **given, steps=1) for name, change in CHANGES.items()}
    preload = {"preload": TE} if request.param == "te" else {}
    results = run_ranks(1, live, list(cases.values()), **preload)
    return {name: found["weights"] for name, (found,) in zip(cases, results)}


@pytest.mark.parametrize("start", ["new", "resumed"])
def test_weights_decay_as_the_recipe_says_and_norm_gains_do_not(weights, start):
    plain, decayed = weights[start, "nothing"], weights[start, "weight decay"]
    for name, before in weights[start, "before"].items():
        expected = -VALUES.learning_rate * 10.0 * before if before.ndim > 1 else np.zeros_like(before)
        np.testing.assert_allclose(decayed[name] - plain[name], expected, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("change", ["betas", "epsilon"])
def test_adam_s_own_options_are_the_recipe_s(weights, change):
    for start in ("new", "resumed") if change == "epsilon" else ("resumed",):  # a first step knows no betas
        plain, changed = weights[start, "nothing"], weights[start, change]
        assert [name for name in plain if np.array_equal(plain[name], changed[name])] == []
