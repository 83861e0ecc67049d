"""The gate of each published kind against plain loops, and its training in layouts as in one process."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.routing.gate import affinities, best_experts, weights_of
from parallel.errors import RecipeError
from testing.lanes import examples
from testing.ranks import run_ranks
from testing.training.tiny import Case, small_recipe, train_rank


@settings(deadline=None, max_examples=examples(100))
@given(
    groups=st.sampled_from([1, 2, 4]), group_best=st.integers(1, 2), topk=st.integers(1, 4), seed=st.integers(0, 999)
)
def test_experts_and_weights_equal_plain_loops(groups, group_best, topk, seed):
    generator = torch.Generator().manual_seed(seed)
    logits, bias = torch.randn(6, 8, generator=generator), torch.randn(8, generator=generator)
    open_groups, size = (groups + 1) // 2, 8 // groups
    topk = min(topk, open_groups * size)
    for score_function in ("sigmoid", "softmax"):
        affinity = affinities(logits, score_function)
        scores = affinity + bias
        found = best_experts(scores, topk, groups=groups, open_groups=open_groups, group_best=group_best)
        for normalise in (True, False):
            weights = weights_of(affinity, found, normalise=normalise)
            for token in range(6):
                row = scores[token].tolist()
                members = [range(g * size, (g + 1) * size) for g in range(groups)]
                merit = [sum(sorted((row[e] for e in group), reverse=True)[:group_best]) for group in members]
                allowed = sorted(range(groups), key=lambda g: -merit[g])[:open_groups]
                expected = sorted((e for g in allowed for e in members[g]), key=lambda e: -row[e])[:topk]
                assert found[token].tolist() == expected
                share = torch.stack([affinity[token, e] for e in expected])
                torch.testing.assert_close(weights[token], share / share.sum() if normalise else share)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("model.topk_method=greedy",), "model.n_group"),
        (("model.topk_method=capacity", "model.n_group=1", "model.topk_group=1"), "model.scoring_func"),
        (("model.topk_method=capacity", "model.scoring_func=softmax"), "model.n_group"),
    ],
)
def test_a_setting_without_effect_is_refused(words, named):
    with pytest.raises(RecipeError, match=named):
        small_recipe(*words)


V2_GATE = (
    "model.model_type=deepseek_v2", "model.scoring_func=softmax", "model.topk_method=group_limited_greedy",
    "model.norm_topk_prob=false", "model.routed_scaling_factor=4.0",
)  # fmt: skip
LAYOUTS = [
    ("parallel.expert=2",), ("parallel.tensor=2",), ("parallel.context=2",),
    ("parallel.pipeline=2", "parallel.schedule=dualpipe", "optim.micro_batch=1"),
]  # fmt: skip


@pytest.mark.parametrize("gate", [("model.norm_topk_prob=false",), V2_GATE], ids=["not normalised", "DeepSeek-V2"])
def test_the_gate_trains_in_every_layout_as_in_one_process(gate, tmp_path):
    for layouts in (LAYOUTS[:3], LAYOUTS[3:]):
        batch = tuple(word for word in layouts[0] if word.startswith("optim"))
        path = str(tmp_path / f"reference{len(layouts)}.pt")
        ((expected,),) = run_ranks(1, train_rank, [Case((*gate, *batch), steps=2, save_to=path)])
        assert all(result.loads is not None for result in expected["results"])
        found = run_ranks(2, train_rank, [Case((*gate, *layout), steps=2, reference=path) for layout in layouts])
        for layout, results in zip(layouts, found):
            for rank in results:
                for mine, theirs in zip(rank["results"], expected["results"]):
                    assert mine.lm_loss == pytest.approx(theirs.lm_loss, rel=1e-5), layout
                    assert mine.balance_loss == pytest.approx(theirs.balance_loss, rel=1e-4), layout
                    assert (mine.loads == theirs.loads).all(), layout
                assert max(max(errors.values()) for errors in rank["gradient_errors"]) < 1e-4, layout
