"""What a search tries beside degrees: context parallelism, and the split of layers over stages."""

import pytest

from dsv3_megatron.planning import search
from dsv3_megatron.planning.memory.formulae import estimate_stages
from dsv3_megatron.planning.plan import make_plan
from dsv3_megatron.planning.splits import better, shorter_split
from launcher.command_line.compose import compose

H200 = ("recipe=dsv3_671b", "cluster=h200_256", "optim.global_batch=1024")
INTERLEAVED = (*H200, "parallel.pipeline=8", "parallel.expert=32", "parallel.schedule=interleaved", "parallel.chunks=2")


def _plan(recipe, layers=None):
    parallel = recipe.parallel.model_copy(update={"stages": layers})
    changed = recipe.model_copy(update={"parallel": parallel})
    return make_plan(changed, recipe.cluster.world_size, measure=estimate_stages)


def _task(*overrides):
    recipe = compose(list(overrides))
    return search._task(recipe, recipe.cluster.world_size, search._values(recipe), 1)


def test_moving_layers_makes_a_step_shorter_than_the_balanced_split():
    recipe = compose(list(INTERLEAVED))
    balanced = _plan(recipe)
    best = shorter_split(balanced, lambda layers: _plan(recipe, layers), tries=24)
    assert sum(best.layers) == sum(balanced.layers) == 61
    assert best.fits
    assert best.step.seconds < 0.99 * balanced.step.seconds


def test_moving_layers_mends_a_split_that_does_not_fit():
    recipe = compose([*H200, "parallel.expert=16", "parallel.schedule=1f1b"])
    lopsided = _plan(recipe, (12, *(3,) * 8, *(4,) * 6, 1))
    assert not lopsided.fits
    best = shorter_split(lopsided, lambda layers: _plan(recipe, layers), tries=24)
    assert best.fits and better(best, lopsided)


def test_no_more_plans_are_made_than_asked_for_and_the_plan_given_is_the_least():
    recipe, made = compose(list(INTERLEAVED)), []

    def make(layers):
        made.append(layers)
        return _plan(recipe, layers)

    balanced = _plan(recipe)
    assert not better(balanced, shorter_split(balanced, make, tries=3))
    assert len(made) == len(set(made)) == 3


@pytest.mark.parametrize(("length", "degrees"), [(4096, [2, 4]), (32768, [2, 4, 8, 16, 32]), (1024, [])])
def test_context_parallelism_is_tried_while_ranks_keep_a_thousand_tokens(length, degrees):
    task = _task(*H200, f"data.sequence_length={length}")
    assert [recipe.parallel.context for _, recipe, _ in search.contexts(task)] == degrees
    assert all(f"parallel.context={d}" in words for d, (words, _, _) in zip(degrees, search.contexts(task)))


def test_the_split_found_is_in_the_overrides_and_can_be_planned_from_them():
    found = search.try_split(_task(*INTERLEAVED))
    words = [word for word in found.overrides if word.startswith("parallel.stages=")]
    again = make_plan(compose([*INTERLEAVED, *found.overrides]), 256, measure=estimate_stages)
    assert len(words) == 1
    assert again.step.seconds == pytest.approx(found.seconds)


def test_long_sequences_are_split_over_context_parallel_ranks(monkeypatch):
    """128K tokens of one sequence fit no H200 here; the search finds the degree that does."""
    monkeypatch.setattr(search, "_SCHEDULES", (("dualpipe", 1),))
    monkeypatch.setattr(search, "_REFINED", 2)
    monkeypatch.setattr(search, "_SPLIT", 1)
    monkeypatch.setattr(search, "_SPLIT_TRIES", 2)
    words = (*H200, "data.sequence_length=131072", "parallel.pipeline=8", "parallel.expert=32")
    recipe = compose(list(words))
    monkeypatch.setattr(search, "layouts", lambda *of: [_task(*words)])
    own, found, _ = search.search_layouts(recipe, 256, processes=1)
    assert not own.fits
    assert found[0].fits
    assert any(word.startswith("parallel.context=") and not word.endswith("=1") for word in found[0].overrides)
