"""Training in emulated FP8: every layout as close to one process as tile boundaries allow; resume is bit-exact."""

import pytest

from testing.lanes import in_lanes
from testing.ranks import run_ranks
from testing.training.checkpoints import assert_same_tensors
from testing.training.tiny import Case, train_rank
from testing.training.whole_runs import FOUR_STEPS, copy_of, steps, train

FP8 = ("precision=fp8", "precision.parameters=fp32", "precision.moments=fp32")
# Tiles of X and dY along channels, and of W, are the same in these layouts, so the first loss is. Where a microbatch's
# tokens meet no other rank's, tiles along tokens are the same too, and with them every gradient.
SAME_TILES = {
    "PP2 dualpipe": (2, ("parallel.pipeline=2", "parallel.schedule=dualpipe")),
    "PP2 zb1p": (2, ("parallel.pipeline=2", "parallel.schedule=zb1p")),
    "DP2": (2, ()),
}
# Experts see tokens of two ranks at once, TP and CP cut channels and tokens: other tiles, rounding noise of FP8.
OTHER_TILES = {
    "EP2": (2, ("parallel.expert=2",)),
    "TP2": (2, ("parallel.tensor=2",)),
    "CP2": (2, ("parallel.context=2",)),
    "PP2 x EP2 dualpipe": (
        4,
        ("parallel.pipeline=2", "parallel.expert=2", "parallel.schedule=dualpipe", "optim.micro_batch=1"),
    ),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("fp8") / "reference.pt")
    ((found,),) = run_ranks(1, train_rank, [Case(FP8, save_to=path)])
    return found, path


def run_all(layouts, path):
    for ranks in (2, 4):
        asked = {n: Case((*FP8, *o), reference=path) for n, (many, o) in layouts.items() if many == ranks}
        yield from zip(asked, run_ranks(ranks, train_rank, list(asked.values())) if asked else ())


def test_layouts_with_the_same_tiles_train_as_one_process(reference):
    found, path = reference
    for name, ranks in run_all(SAME_TILES, path):
        for rank in ranks:
            first, *later = zip(rank["results"], found["results"], strict=True)
            assert first[0].lm_loss == pytest.approx(first[1].lm_loss, rel=1e-5), name
            # Weights now differ by the order of sums, and a number on the border of two in FP8 goes to another one.
            for mine, expected in later:
                assert mine.lm_loss == pytest.approx(expected.lm_loss, rel=1e-4), name
            worst = max(rank["gradient_errors"][0].values())
            assert worst < 1e-3, (name, worst)


@pytest.mark.parametrize("layouts", in_lanes(OTHER_TILES, "EP2", "TP2"))
def test_layouts_with_other_tiles_differ_by_the_rounding_of_fp8_only(reference, layouts):
    found, path = reference
    for name, ranks in run_all(layouts, path):
        first = 1e-5 if "TP" not in name and "CP" not in name else 2e-3
        for rank in ranks:
            assert rank["results"][0].lm_loss == pytest.approx(found["results"][0].lm_loss, rel=first), name
            for mine, expected in zip(rank["results"], found["results"]):
                assert mine.lm_loss == pytest.approx(expected.lm_loss, rel=2e-3), name


@pytest.mark.parametrize("schedule", ["dualpipe", pytest.param("zb1p", marks=pytest.mark.full)])
def test_recomputation_changes_no_bit(schedule):
    # BF16 parameters: norms in float32 add up a gradient's parts in another order when they are computed again.
    # SwiGLU's cache is not in FP8, as it would be computed again from there without being asked.
    common = (
        "precision=fp8",
        "precision.fp8.swiglu_cache=high",
        "parallel.pipeline=2",
        f"parallel.schedule={schedule}",
    )
    asked = [Case((*common, f"parallel.recompute=[{names}]")) for names in ("", "norm,mla_up,moe_act")]
    for kept, again in zip(*run_ranks(2, train_rank, asked)):
        for one, other in zip(kept["results"], again["results"], strict=True):
            assert (one.lm_loss, one.grad_norm) == (other.lm_loss, other.grad_norm)


def test_fp8_differs_from_float32_yet_little(reference):
    ((plain,),) = run_ranks(1, train_rank, [Case(())])
    for mine, exact in zip(reference[0]["results"], plain["results"]):
        assert mine.lm_loss != exact.lm_loss
        assert mine.lm_loss == pytest.approx(exact.lm_loss, rel=5e-3)


@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=pytest.mark.full), "fp8"])
def test_a_resumed_run_of_low_precision_is_bit_exact(tmp_path, precision):
    layout = (f"precision={precision}", "parallel.pipeline=2", "parallel.schedule=dualpipe")
    train(2, *FOUR_STEPS, *layout, f"run.directory={tmp_path / 'whole'}")
    place = copy_of(tmp_path / "whole", tmp_path / "resumed", keep_steps=2)
    train(2, *FOUR_STEPS, *layout, f"run.directory={place}")
    for mine, theirs in zip(steps(place), steps(tmp_path / "whole"), strict=True):
        assert (mine["lm_loss"], mine["grad_norm"]) == (theirs["lm_loss"], theirs["grad_norm"])
    final = "checkpoints/step_00000004"
    assert_same_tensors(place / final, tmp_path / "whole" / final)
