"""What is trained of a model that is frozen in part trains as in one process, in every layout and schedule."""

import pytest
import torch

from dsv3_megatron.model.freeze import is_frozen
from testing.lanes import in_lanes
from testing.ranks import TE, run_ranks
from testing.training.on_te import WORDS, Training, train, untrained
from testing.training.one_process import check
from testing.training.tiny import Case, train_rank

EIGHT = ("model.num_hidden_layers=8", "optim.global_batch=8", "optim.micro_batch=1", "data.sequence_length=16")
FROZEN = {
    "first stage": "[embedding,layers.0-4]",  # and more: a stage, or a rank, without anything to train
    "last stage": "[head,norms,mtp,layers.4-7]",
    "experts, router": "[experts,router]",
    "all but experts": "[embedding,head,attention,dense,shared_experts,router,norms]",
    "all but the embedding": "[head,norms,mtp,layers.0-7]",
}
PIPELINE = ("parallel.pipeline=2",)
# Layout -> (ranks, overrides, what is frozen there). Both pipelines of DualPipe meet everything; the others whatever
# leaves a stage, a rank or an exchange of theirs without anything to train.
LAYOUTS = {
    "1f1b": (2, (*PIPELINE, "parallel.schedule=1f1b"), ("first stage", "last stage", "experts, router")),
    "interleaved, recompute": (
        2,
        (*PIPELINE, "parallel.schedule=interleaved", "parallel.chunks=2", "parallel.recompute=[norm,mla_up,moe_act]"),
        ("first stage", "last stage"),
    ),
    "zb1p, full recompute": (
        2,
        (*PIPELINE, "parallel.schedule=zb1p", "parallel.recompute=[full]"),
        ("first stage", "all but the embedding"),
    ),
    "dualpipe, recompute": (
        2,
        (*PIPELINE, "parallel.schedule=dualpipe", "parallel.recompute=[norm,mla_up,moe_act]"),
        tuple(FROZEN),
    ),
    "TP2, expert-TP2": (
        2,
        ("parallel.tensor=2", "parallel.expert_tensor=2"),
        ("last stage", "experts, router", "all but experts"),
    ),
    "CP2, DP1": (2, ("parallel.context=2",), ("first stage", "all but experts")),
    "dualpipe, EP2": (
        4,
        (*PIPELINE, "parallel.schedule=dualpipe", "parallel.expert=2"),
        ("experts, router", "all but experts"),
    ),
    "dualpipev, EP2": (4, (*PIPELINE, "parallel.schedule=dualpipev", "parallel.expert=2"), tuple(FROZEN)),
    "dualpipe, TP2": (
        4,
        (*PIPELINE, "parallel.schedule=dualpipe", "parallel.tensor=2"),
        ("all but experts", "all but the embedding"),
    ),
    "zb1p, DP2": (4, (*PIPELINE, "parallel.schedule=zb1p"), ("last stage", "experts, router")),
}


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Return name of what is frozen -> (what one process measured, where its gradients and weights lie)."""
    folder = tmp_path_factory.mktemp("reference")
    asked = [
        Case((*EIGHT, f"model.freeze={freeze}"), steps=2, save_to=str(folder / f"{number}.pt"))
        for number, freeze in enumerate(FROZEN.values())
    ]
    start = Case(EIGHT, steps=0, save_to=str(folder / "start.pt"))
    *found, _ = run_ranks(1, train_rank, [*asked, start])
    weights = torch.load(start.save_to)["weights"]
    for freeze, case in zip(FROZEN.values(), asked):
        mine = torch.load(case.save_to)["weights"]
        same = {name for name in mine if torch.equal(mine[name], weights[name])}
        assert same == {name for name in mine if is_frozen(freeze.strip("[]").split(","), name)}
    return {name: (one[0], case.save_to) for name, one, case in zip(FROZEN, found, asked)}


CASES = {f"{layout}, {what} frozen": (layout, what) for layout, (*_, each) in LAYOUTS.items() for what in each}
FAST = (
    "1f1b, first stage frozen",
    "zb1p, full recompute, all but the embedding frozen",
    "dualpipe, recompute, first stage frozen",
    "dualpipe, recompute, last stage frozen",
    "dualpipev, EP2, experts, router frozen",
    "dualpipev, EP2, all but the embedding frozen",
    "dualpipe, TP2, all but experts frozen",
    "TP2, expert-TP2, last stage frozen",
)


@pytest.mark.parametrize("cases", in_lanes(CASES, *FAST))
def test_what_is_trained_trains_as_in_one_process(references, cases):
    for ranks in (2, 4):
        asked = {name: pair for name, pair in cases.items() if LAYOUTS[pair[0]][0] == ranks}
        given = [
            Case((*EIGHT, *LAYOUTS[layout][1], f"model.freeze={FROZEN[what]}"), steps=2, reference=references[what][1])
            for layout, what in asked.values()
        ]
        for (name, (_, what)), found in zip(asked.items(), run_ranks(ranks, train_rank, given) if given else ()):
            check(name, found, references[what][0])
            frozen = FROZEN[what].strip("[]").split(",")
            for rank in found:
                assert not [key for errors in rank["gradient_errors"] for key in errors if is_frozen(frozen, key)], name
                errors = rank["weight_errors"]
                assert not [key for key in errors if is_frozen(frozen, key) and errors[key]], name


ON_TE = ("optim.global_batch=8", "optim.micro_batch=1", "model.num_hidden_layers=4")


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_transformer_engine_trains_what_is_not_frozen(precision):
    words = (*WORDS, *ON_TE, f"precision={precision}")
    dual = (*PIPELINE, "parallel.schedule=dualpipe", "parallel.expert=2")
    freezes = ("[embedding,layers.0-1]", "[experts,router]", "[attention,norms]", "[head,norms,mtp,layers.2-3]")
    asked = [Training((*words, f"model.freeze={freeze}")) for freeze in freezes]
    (free,), *alone = run_ranks(1, train, [Training(words, steps=1), *asked], preload=TE)
    layouts = [Training((*words, *dual, f"model.freeze={freeze}")) for freeze in freezes]
    for freeze, (one,), many in zip(freezes, alone, run_ranks(4, train, layouts, preload=TE)):
        assert untrained(one) == [] and len(one["wgrads"]) < len(free["wgrads"]), freeze
        for rank in many:
            assert rank["losses"] == pytest.approx(one["losses"], rel=1e-3), freeze
            assert rank["norms"] == pytest.approx(one["norms"], rel=0.05), freeze
            assert untrained(rank) == [], freeze
