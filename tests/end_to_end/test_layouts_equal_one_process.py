"""Every parallel layout trains as one process does: losses to 1e-5, every gradient to 1e-4, step after step."""

import pytest

from testing.lanes import in_lanes
from testing.ranks import run_ranks
from testing.training.one_process import check
from testing.training.tiny import Case, train_rank

TWO = {
    "DP2": (),
    "EP2": ("parallel.expert=2",),
    "PP2": ("parallel.pipeline=2",),
    "PP2 uneven": ("parallel.pipeline=2", "parallel.stages=[1,3]"),
    "CP2": ("parallel.context=2",),
    "CP2 recompute": ("parallel.context=2", "parallel.recompute=[norm,mla_up,moe_act]"),
    "TP2": ("parallel.tensor=2",),
    "TP2 x EP2": ("parallel.tensor=2", "parallel.expert=2"),
    "TP2 x expert-TP2": ("parallel.tensor=2", "parallel.expert_tensor=2"),
    "expert-TP2": ("parallel.expert_tensor=2",),
    "DP2 recompute": ("parallel.recompute=[norm,mla_up,moe_act,attention]",),
    "EP2 microbatch 1": ("parallel.expert=2", "optim.micro_batch=1"),
}
FOUR = {
    "PP2 x EP2": ("parallel.pipeline=2", "parallel.expert=2"),
    "PP4": ("parallel.pipeline=4",),
    "TP2 x EP2 x PP2": ("parallel.tensor=2", "parallel.expert=2", "parallel.pipeline=2"),
    "EP2 x expert-TP2": ("parallel.expert=2", "parallel.expert_tensor=2"),
    "TP2 x EP2 x expert-TP2": ("parallel.tensor=2", "parallel.expert=2", "parallel.expert_tensor=2"),
    "CP4": ("parallel.context=4",),
    "CP2 x TP2": ("parallel.context=2", "parallel.tensor=2", "parallel.recompute=[mla_up,attention]"),
    "CP2 x EP2": ("parallel.context=2", "parallel.expert=2"),
    "PP2 full recompute": ("parallel.pipeline=2", "parallel.recompute=[full]"),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("reference") / "reference.pt")
    ((found,),) = run_ranks(1, train_rank, [Case(save_to=path)])
    return found, path


@pytest.mark.parametrize(
    "layouts", in_lanes(TWO, "EP2", "PP2 uneven", "CP2 recompute", "TP2 x EP2", "expert-TP2", "DP2 recompute")
)
def test_two_ranks_train_as_one_process(reference, layouts):
    found, path = reference
    cases = [Case(overrides, reference=path) for overrides in layouts.values()]
    for name, ranks in zip(layouts, run_ranks(2, train_rank, cases)):
        check(name, ranks, found)


@pytest.mark.parametrize("layouts", in_lanes(FOUR, "TP2 x EP2 x PP2", "CP2 x TP2", "EP2 x expert-TP2"))
def test_four_ranks_train_as_one_process(reference, layouts):
    found, path = reference
    cases = [Case(overrides, reference=path) for overrides in layouts.values()]
    for name, ranks in zip(layouts, run_ranks(4, train_rank, cases)):
        check(name, ranks, found)


def test_a_run_learns(reference):
    found, _ = reference
    losses = [r.lm_loss for r in found["results"]]
    assert losses[-1] < losses[0]
