"""The fast path says what the exact one finds: formulae against the real modules on fake tensors, at true widths."""

from dataclasses import asdict

import pytest

from dsv3_megatron.planning.memory.formulae import estimate_stages
from dsv3_megatron.planning.plan import make_plan
from launcher.command_line.compose import compose

SHORT = (
    "recipe=dsv3_671b",
    "model.num_hidden_layers=4",
    "model.first_k_dense_replace=1",
    "parallel.pipeline=2",
    "cluster.nodes=16",
)
RECOMPUTE = ("parallel.recompute=[norm,mla_up,moe_act]",)
BETWEEN = ("kept", "kept_deferred")
PEAKS = ("peak_forward", "peak_backward", "peak_weight_grad")


# Every schedule family, recomputation, precision and TP once, not with each other: the exact path takes seconds a case.
@pytest.mark.parametrize(
    "overrides",
    [
        ("parallel.schedule=dualpipev", "parallel.recompute=[shared_experts,mlp]", "precision=bf16"),
        ("parallel.schedule=zb1p", "parallel.recompute=[moe]", "precision=bf16"),
        ("parallel.schedule=1f1b", "parallel.recompute=[full]", "precision=bf16"),
        ("parallel.schedule=dualpipev", "precision=bf16", "model.freeze=[embedding,experts,layers.0-1]"),
        *(
            pytest.param(words, marks=pytest.mark.full)
            for words in (
                ("parallel.schedule=1f1b", "parallel.recompute=[]", "precision=bf16", "model.freeze=[experts]"),
                ("parallel.schedule=zb1p", "precision=fp8", "model.freeze=[attention,head,norms,router]"),
                ("parallel.schedule=zb1p", *RECOMPUTE, "parallel.tensor=2", "precision=bf16"),
                ("parallel.schedule=1f1b", "parallel.recompute=[mla_up,attention]", "optim.qk_clip=100"),
                ("parallel.schedule=1f1b", "parallel.recompute=[attention]", "optim.micro_batch=2"),
                ("parallel.schedule=dualpipe", *RECOMPUTE, "parallel.context=8", "data.sequence_length=32768"),
            )
        ),
    ],
    ids=" ".join,
)
def test_formulae_agree_with_the_exact_path(overrides):
    recipe = compose([*SHORT, *overrides])
    exact, fast = make_plan(recipe, 128), make_plan(recipe, 128, measure=estimate_stages)
    for one, other in zip(map(asdict, exact.stages), map(asdict, fast.stages)):
        print(one, other, sep="\n")
        for name in ("parameters", "expert_parameters", "fp8_parameters", "message", "frozen", "frozen_experts"):
            assert one[name] == other[name], name
        for name in BETWEEN:
            assert other[name] == pytest.approx(one[name], rel=0.02), name
        for name in PEAKS:  # too little would say that something fits which does not
            assert 0.95 * one[name] <= other[name] <= 1.2 * one[name], name
    for one, other in zip(exact.ranks, fast.ranks):
        assert other.total_bytes == pytest.approx(one.total_bytes, rel=0.015)
    assert exact.step == fast.step


def test_experts_of_one_rank_exchange_nothing():
    recipe = compose(["recipe=dsv3_one_gpu"])
    exact, fast = make_plan(recipe, 1), make_plan(recipe, 1, measure=estimate_stages)
    assert fast.tightest.total_bytes == pytest.approx(exact.tightest.total_bytes, rel=0.005)


def test_a_block_of_logits_counts_where_nothing_else_is_larger():
    """At this size attention is small beside 64 MiB, and the head smaller still."""
    words = ["recipe=dsv3_one_gpu", "precision=bf16", "model.vocab_size=1024", "data.sequence_length=4096"]
    small = ["model.hidden_size=256", "model.moe_intermediate_size=64", "model.intermediate_size=256"]
    small += ["model.n_routed_experts=8", "model.num_experts_per_tok=1", "model.n_group=1", "model.topk_group=1"]
    small += ["model.num_attention_heads=8", "parallel.recompute=[]", "model.num_nextn_predict_layers=0"]
    for measure in ({}, {"measure": estimate_stages}):
        free, clipped = (
            make_plan(compose([*words, *small, f"optim.qk_clip={threshold}"]), 1, **measure).stages[0].peak_forward
            for threshold in ("null", "100")
        )
        assert clipped - free > 16 * 2**20
