"""Self-speculation gives the greedy text in fewer passes; acceptance as a slow count says; top-p keeps a nucleus."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.inference.generate import continue_tokens, nucleus
from dsv3_megatron.inference.speculate import (
    Speculation,
    acceptance_rates,
    depth_states,
    likeliest,
    main_states,
    speculate_tokens,
)
from dsv3_megatron.inference.trained_model import trained_model
from dsv3_megatron.model.stage import forward_logits
from dsv3_megatron.train.run import run as train
from launcher import generate
from launcher.command_line.compose import load_resolved, resolved_yaml
from launcher.command_line.console import SilentReporter
from parallel.errors import RecipeError
from parallel.world import World
from testing.training.tiny import small_recipe

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model that has learned to count (synthetic data), MTP of depth 2, loaded whole."""
    directory = tmp_path_factory.mktemp("speculate") / "run"
    recipe = small_recipe(
        "model.num_nextn_predict_layers=2", "run.steps=60", "optim.learning_rate=0.01", f"run.directory={directory}"
    )
    torch.set_num_threads(1)
    train(recipe, World(0, 1, 0), SilentReporter(), resolved_yaml(recipe))
    with trained_model(load_resolved(directory / "recipe.yaml"), directory) as loaded:
        yield directory, loaded


PROMPTS = [[3, 4, 5, 6], [10, 12, 14], [7], [200, 203, 206, 209, 212]]


def test_the_states_are_the_ones_the_logits_come_from(model):
    module, tokens = model[1].parts.whole_model, torch.tensor([PROMPTS[0] * 3])
    assert torch.equal(likeliest(module, main_states(module, tokens)), forward_logits(module, tokens).argmax(-1))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_speculation_gives_the_greedy_text_in_fewer_passes(model, prompt):
    parts, counts = model[1].parts, Speculation()
    options = {"count": 24, "window": 32, "end": None}
    greedy = list(continue_tokens(parts, prompt, temperature=0, seed=0, **options))
    assert list(speculate_tokens(parts, prompt, counts=counts, **options)) == greedy
    assert counts.passes == len(greedy) - counts.accepted
    assert counts.passes < len(greedy) and 0 < counts.accepted <= counts.drafted


def test_beyond_the_window_and_at_the_end_token_the_text_stays_the_greedy_one(model):
    parts = model[1].parts
    for options in ({"count": 20, "window": 12, "end": None}, {"count": 20, "window": 32, "end": 9}):
        greedy = list(continue_tokens(parts, [3, 4, 5, 6], temperature=0, seed=0, **options))
        assert list(speculate_tokens(parts, [3, 4, 5, 6], counts=Speculation(), **options)) == greedy
        counts = Speculation()
        one = list(speculate_tokens(parts, [3, 4, 5, 6], counts=counts, count=1, window=32, end=None))
        assert one == greedy[:1] and counts.passes == 1 and counts.drafted == 0


def test_acceptance_is_what_a_slow_count_says(model):
    module = model[1].parts.whole_model
    samples = [model[1].data.held_out.sample(n) for n in range(3)]
    tokens, labels = (torch.stack([torch.from_numpy(getattr(s, k)) for s in samples]) for k in ("tokens", "labels"))
    batch = {"tokens": tokens, "labels": labels, "loss_mask": torch.ones(tokens.shape)}
    rates = acceptance_rates(module, [batch], 2)
    hits, tries = [0, 0], [0, 0]
    length = tokens.shape[1]
    for row in range(len(tokens)):
        states = main_states(module, tokens[row : row + 1])
        own = likeliest(module, states)[0]
        drafts = []
        for depth in (1, 2):
            ahead = torch.cat([labels[row, depth - 1 :], torch.zeros(depth - 1, dtype=torch.long)])
            states = depth_states(module, depth, states, ahead.unsqueeze(0))
            drafts.append(likeliest(module, states)[0])
        for position in range(length):
            for depth in (1, 2):
                if position + depth >= length:
                    break
                tries[depth - 1] += 1
                if drafts[depth - 1][position] != own[position + depth]:
                    break
                hits[depth - 1] += 1
    assert rates == pytest.approx([h / t for h, t in zip(hits, tries)])
    assert rates[0] > 0.3, "an MTP module that has learned nothing would hit once in 256"


def test_generate_refuses_to_draft_samples(model):
    directory, _ = model
    with pytest.raises(RecipeError, match="temperature = 0.5"):
        generate.main([f"run={directory}", "prompt=x", "speculate=true", "temperature=0.5"])


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=40), st.floats(0.01, 1))
@settings(deadline=None)
def test_a_nucleus_is_the_fewest_likeliest_tokens_that_reach_p(weights, top_p):
    chances = np.array(weights) / np.sum(weights)
    kept = nucleus(chances, top_p)
    assert kept.sum() == pytest.approx(1)
    chosen = kept > 0
    assert chances[chosen].sum() >= top_p - 1e-9
    if chosen.sum() > 1:
        assert chances[chosen].sum() - chances[chosen].min() < top_p
    assert (~chosen).sum() == 0 or chances[~chosen].max() <= chances[chosen].min()
    np.testing.assert_allclose(kept[chosen] / kept[chosen].sum(), chances[chosen] / chances[chosen].sum())


@pytest.mark.full
def test_evaluate_on_a_run(model):
    """In a process of its own: the fixture's model is alive in this one."""

    def evaluated(*words):
        command = [sys.executable, "launcher/evaluate.py", f"run={model[0]}", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    done = evaluated("step=60")
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert len(values["mtp_acceptance"]) == 2 and values["step"] == 60
    done = evaluated("step=7")
    assert done.returncode == 2 and "there are: 60" in done.stderr
