"""Every parallel layout trains as one process does: losses to 1e-5, every gradient to 1e-4, step after step."""

import pytest

from tests.ranks import run_ranks
from tests.tiny import Case, train_rank

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


def check(name, ranks, found):
    for step, expected in enumerate(found["results"]):
        for rank, mine in enumerate(r["results"][step] for r in ranks):
            where = f"{name}, step {step}, rank {rank}"
            for field in ("lm_loss", "mtp_loss", "balance_loss", "grad_norm", "max_violation"):
                got, want = getattr(mine, field), getattr(expected, field)
                assert got == (want if want is None else pytest.approx(want, rel=1e-5)), (where, field)
    for rank, result in enumerate(ranks):
        for step, errors in enumerate(result["gradient_errors"]):
            worst = max(errors, key=errors.get)
            assert errors[worst] < 1e-4, (name, "gradient", worst, f"step {step}, rank {rank}", errors[worst])
        worst = max(result["weight_errors"], key=result["weight_errors"].get)
        assert result["weight_errors"][worst] < 1e-3, (name, "weight", worst, rank, result["weight_errors"][worst])


def test_two_ranks_train_as_one_process(reference):
    found, path = reference
    cases = [Case(overrides, reference=path) for overrides in TWO.values()]
    for name, ranks in zip(TWO, run_ranks(2, train_rank, cases)):
        check(name, ranks, found)


def test_four_ranks_train_as_one_process(reference):
    found, path = reference
    cases = [Case(overrides, reference=path) for overrides in FOUR.values()]
    for name, ranks in zip(FOUR, run_ranks(4, train_rank, cases)):
        check(name, ranks, found)


def test_a_run_learns(reference):
    found, _ = reference
    losses = [r.lm_loss for r in found["results"]]
    assert losses[-1] < losses[0]
