"""Capacity-aware routing against a slow reference, and its training in layouts and schedules."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.model.config import transformer_config
from dsv3_megatron.routing.capacity import CapacityRouter, allocate, expert_capacity, selected_softmax
from parallel.layout import Layout
from parallel.settings import ParallelSettings
from testing.lanes import examples
from testing.ranks import run_ranks
from testing.training.tiny import Case, small_recipe, train_rank


def slow_allocation(scores, topk, capacity):
    """Return each token's experts, asked for one at a time; and how many choices found no room."""
    tokens, experts = len(scores), len(scores[0])
    room, chosen, dropped = [capacity] * experts, [set() for _ in range(tokens)], 0
    for _ in range(topk):
        waiting = list(range(tokens))
        while waiting:
            asked, later = {}, []
            for token in waiting:
                open_experts = [e for e in range(experts) if e not in chosen[token] and room[e]]
                if not open_experts:
                    dropped += 1
                    continue
                asked.setdefault(max(open_experts, key=lambda e: scores[token][e]), []).append(token)
            for expert, askers in asked.items():
                for token in askers[: room[expert]]:
                    chosen[token].add(expert)
                later += askers[room[expert] :]
                room[expert] -= min(room[expert], len(askers))
            waiting = sorted(later)
    return chosen, dropped


@settings(deadline=None, max_examples=examples(150))
@given(
    tokens=st.integers(1, 24), experts=st.integers(2, 6), topk=st.integers(1, 2), capacity=st.integers(0, 12),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_allocation_equals_the_slow_one_and_never_exceeds_capacity(tokens, experts, topk, capacity, seed):
    scores = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    found = allocate(scores, topk, capacity)
    chosen, dropped = slow_allocation(scores.tolist(), topk, capacity)
    assert [set(row.nonzero().flatten().tolist()) for row in found.chosen] == chosen
    assert found.dropped.item() == dropped and found.chosen.sum().item() == tokens * topk - dropped
    assert (found.chosen.sum(0) <= capacity).all()
    best = [set(row.topk(topk).indices.tolist()) for row in scores]
    assert found.rerouted.item() == sum(len(c - b) for c, b in zip(chosen, best))


def test_with_room_for_all_it_is_top_k():
    scores = torch.randn(50, 8)
    found = allocate(scores, 2, 50)
    assert found.rerouted == found.dropped == 0
    assert (found.chosen == torch.zeros(50, 8).scatter_(1, scores.topk(2).indices, 1).bool()).all()


def test_no_token_is_dropped_when_capacity_is_at_least_even():
    # Every token wants the same two experts; at factor 1.0 all experts fill up exactly.
    scores = torch.arange(8.0).expand(64, 8)
    found = allocate(scores, 2, expert_capacity(64, 2, 8, 1.0))
    assert found.chosen.sum(0).tolist() == [16] * 8 and found.dropped == 0 and found.rerouted == 96


def test_softmax_is_over_the_selected_only():
    logits = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]], requires_grad=True)
    weights = selected_softmax(logits, torch.tensor([[False, True, True], [False, False, False]]))
    expected = torch.tensor([2.0, 3.0]).softmax(0)
    torch.testing.assert_close(weights, torch.stack([torch.tensor([0.0, *expected]), torch.zeros(3)]))
    weights.square().sum().backward()
    assert logits.grad.isfinite().all() and (logits.grad[1] == 0).all()


def test_weights_that_are_not_normalised_are_shares_of_all_experts(one_process):
    words = ("model.topk_method=capacity", "model.scoring_func=softmax", "model.n_group=1", "model.topk_group=1")
    model = small_recipe(*words, "model.norm_topk_prob=false").model
    config = transformer_config(model, ParallelSettings(), Layout())
    router = CapacityRouter(config, pg_collection=one_process, normalise=model.norm_topk_prob)
    logits = torch.randn(6, 2, model.n_routed_experts)
    weights, chosen = router.eval().routing(logits)
    expected = logits.view(12, -1).softmax(-1) * model.routed_scaling_factor
    torch.testing.assert_close(weights, expected * chosen)
    assert (chosen.sum(-1) == model.num_experts_per_tok).all()


ARTICLE = (
    "model.topk_method=capacity", "model.scoring_func=softmax", "model.n_group=1", "model.topk_group=1",
    "model.first_k_dense_replace=0", "model.capacity_factor=1.1", "model.num_nextn_predict_layers=2",
    "model.routed_scaling_factor=1.0", "optim.micro_batch=1", "optim.global_batch=8",
)  # fmt: skip


def test_the_article_variant_trains_as_one_process_under_every_schedule(tmp_path):
    path = str(tmp_path / "reference.pt")
    ((expected,),) = run_ranks(1, train_rank, [Case(ARTICLE, steps=2, save_to=path)])
    overflow = expected["results"][0].overflow
    assert overflow[0] > 0, "capacity matters here"
    layouts = {
        2: [("parallel.expert=2",), *[("parallel.pipeline=2", f"parallel.schedule={s}") for s in ("1f1b", "dualpipe")]]
    }
    for ranks, cases in layouts.items():
        found = run_ranks(ranks, train_rank, [Case((*ARTICLE, *c), steps=2, reference=path) for c in cases])
        for case, results in zip(cases, found):
            for rank in results:
                for mine, theirs in zip(rank["results"], expected["results"]):
                    assert mine.lm_loss == pytest.approx(theirs.lm_loss, rel=1e-5), case
                    assert mine.mtp_loss == pytest.approx(theirs.mtp_loss, rel=1e-5), case
                    assert mine.overflow == theirs.overflow, case
                    assert (mine.loads == theirs.loads).all(), case
                assert max(max(errors.values()) for errors in rank["gradient_errors"]) < 1e-4, case
