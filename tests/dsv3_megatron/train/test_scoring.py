"""Log-likelihoods of sequences and requests: those of the model's plain logits, under every layout."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import dsv3_megatron.train.evaluation.scoring as scoring
from dsv3_megatron.data.source.samples import Synthetic
from dsv3_megatron.data.tasks.requests import Request
from dsv3_megatron.megatron.replaced import replaced
from dsv3_megatron.model.stage import forward_logits
from dsv3_megatron.train.build import build_parts
from dsv3_megatron.train.evaluation.scoring import evaluate_batches, score, score_requests
from parallel.groups import start_processes, stop_processes
from parallel.world import World
from testing.lanes import names_in_lanes
from testing.ranks import run_ranks
from testing.training.tiny import small_recipe, step_batches_of

LONG = ("data.sequence_length=256", "optim.micro_batch=1", "model.num_hidden_layers=4")
COUNT = 5  # held-out sequences: shared by no number of ranks evenly
LAYOUTS = {
    "TP2": (2, ("parallel.tensor=2",)),
    "dualpipe": (2, ("parallel.pipeline=2", "parallel.schedule=dualpipe")),
    "CP2": (2, ("parallel.context=2",)),
    "DP2 EP2": (2, ("parallel.expert=2",)),
    "1f1b": (2, ("parallel.pipeline=2", "parallel.schedule=1f1b")),
    "interleaved": (2, ("parallel.pipeline=2", "parallel.schedule=interleaved", "parallel.chunks=2")),
    "dualpipev": (2, ("parallel.pipeline=2", "parallel.schedule=dualpipev")),
    "TP2 CP2": (4, ("parallel.tensor=2", "parallel.context=2")),
    "PP4": (4, ("parallel.pipeline=4",)),
    "TP2 PP2": (4, ("parallel.tensor=2", "parallel.pipeline=2", "parallel.schedule=zb1p")),
    "dualpipe EP2": (4, ("parallel.pipeline=2", "parallel.schedule=dualpipe", "parallel.expert=2")),
}
FAST = ("TP2", "dualpipe", "CP2", "DP2 EP2")


@dataclass(frozen=True)
class Case:
    """A layout, and the requests to score in it."""

    overrides: tuple[str, ...]
    requests: tuple[Request, ...]


def scores_of(case):
    """Return on this rank the scores of held-out sequences and of requests, and the loss of a training batch."""
    recipe, world = small_recipe(*LONG, *case.overrides), World.from_environment()
    start_processes(world, torch.device("cpu"), timeout_seconds=120)
    try:
        parts = build_parts(recipe, recipe.layout(world.size), torch.device("cpu"))
        return scored(parts, case.requests)
    finally:
        stop_processes()


def scored(parts, requests):
    source = Synthetic(parts.recipe.model.vocab_size, parts.recipe.data.sequence_length, seed=9)
    with replaced(scoring, "MOST_MICROBATCHES", 2):
        in_runs = score(parts, source, COUNT, parts.recipe.optim.micro_batch)
    return {
        "sequences": score(parts, source, COUNT, parts.recipe.optim.micro_batch),
        "in runs": in_runs,
        "requests": score_requests(parts, requests),
        "loss": evaluate_batches(parts, step_batches_of(parts)),
    }


@pytest.fixture(scope="module")
def one():
    """In one process: requests, the scores that plain logits give them, and those of the pipeline."""
    recipe = small_recipe(*LONG)
    start_processes(World(0, 1, 0), torch.device("cpu"))
    try:
        parts = build_parts(recipe, recipe.layout(1), torch.device("cpu"))
        random, requests, expected = np.random.default_rng(1), [], []
        for number in range(40):
            ids = random.integers(0, recipe.model.vocab_size, random.integers(2, 258))
            scored_tokens = int(random.integers(1, len(ids)))
            if number % 3 == 0:  # the model's own choice
                scored_tokens, ids[-1] = 1, logits_of(parts, ids[:-1])[-1].argmax()
            chances = logits_of(parts, ids[:-1]).log_softmax(-1)[-scored_tokens:]
            labels = torch.from_numpy(ids[-scored_tokens:])
            likelihood = chances.gather(1, labels[:, None]).double().sum().item()
            expected.append((likelihood, bool((chances.argmax(-1) == labels).all())))
            requests.append(Request(ids, scored_tokens))
        found = scored(parts, requests)
        answers = iter([True, False, True])
        stopped = score_requests(parts, requests, lambda: next(answers))
        left = list(answers)
        return {"requests": tuple(requests), "expected": expected, "found": found, "stopped": (stopped, left)}
    finally:
        stop_processes()


def logits_of(parts, ids):
    return forward_logits(parts.whole_model, torch.from_numpy(ids)[None])[0].float()


def test_requests_are_scored_as_plain_logits_say(one):
    found, expected = one["found"]["requests"], one["expected"]
    assert found.log_likelihoods == pytest.approx([likelihood for likelihood, _ in expected], abs=1e-4)
    assert found.greedy.tolist() == [greedy for _, greedy in expected]
    assert 14 <= found.greedy.sum() < 40
    assert found.tokens.tolist() == [request.scored for request in one["requests"]]
    assert len({request.length // 64 for request in one["requests"]}) > 2, "rounds of several lengths"


def test_the_loss_of_all_is_that_of_the_tokens_together(one):
    scores = one["found"]["sequences"]
    assert len(scores.tokens) == COUNT and (scores.tokens == 256).all()
    assert scores.loss == pytest.approx(-scores.log_likelihoods.sum() / (COUNT * 256))
    assert scores[1:3].loss == pytest.approx(-scores.log_likelihoods[1:3].mean() / 256)


def test_many_sequences_are_scored_as_few_are(one):
    whole, runs = one["found"]["sequences"], one["found"]["in runs"]
    assert runs.log_likelihoods == pytest.approx(whole.log_likelihoods, rel=1e-9)
    assert len(set(whole.log_likelihoods.round(3))) == COUNT, "their order is seen"


def test_nothing_is_scored_when_the_run_is_to_stop(one):
    assert one["stopped"] == (None, [True]), "asked before every round, and not after a no"


@pytest.mark.parametrize("name", names_in_lanes(LAYOUTS, *FAST))
def test_every_layout_finds_the_same(one, name):
    world, overrides = LAYOUTS[name]
    (ranks,) = run_ranks(world, scores_of, [Case(overrides, one["requests"])])
    for found in ranks:
        for kind in ("sequences", "in runs", "requests"):
            mine, theirs = found[kind], one["found"][kind]
            assert mine.log_likelihoods == pytest.approx(theirs.log_likelihoods, abs=1e-4), (name, kind)
            assert (mine.tokens == theirs.tokens).all() and (mine.greedy == theirs.greedy).all(), (name, kind)
        # of one token in 2,048 two experts are so near each other that a rounding decides
        assert found["loss"] == pytest.approx(one["found"]["loss"], rel=1e-4)
