"""Muon's update of every matrix is the one process's in every layout, step after step and after a resume in another;
and the faults that others have had are seen here."""

import dataclasses

import pytest
import torch

from dsv3_megatron.optim import matrices
from dsv3_megatron.train import muon
from testing.lanes import in_lanes
from testing.ranks import run_ranks
from testing.training.checkpoints import assert_same_tensors, tensors
from testing.training.lives import Life, live
from testing.training.one_process import check
from testing.training.tiny import VALUES, Case, train_rank

MUON = ("optim.name=muon", "optim.micro_batch=1")
HEADS = (
    "optim.muon.query=head",
    "optim.muon.key_value=head",
    "optim.muon.output=head",
    "optim.muon.router=adamw",
    "optim.qk_clip=0.45",
)  # half of the heads have larger logits in the first step
# Large, so that the rounding of the weights does not hide that of their change; nobody would train so.
FAST = dataclasses.replace(VALUES, learning_rate=0.01)
UPDATE = 2e-5  # of float32 sums in another order, through Newton-Schulz, which lifts small directions; 7e-6 measured

DUAL = ("parallel.pipeline=2", "parallel.schedule=dualpipe")
LAYOUTS = {
    "DP4": (),
    "TP2 x DP2": ("parallel.tensor=2",),
    "TP2 x expert-TP2": ("parallel.tensor=2", "parallel.expert_tensor=2"),
    "expert-TP2 x EP2": ("parallel.expert=2", "parallel.expert_tensor=2"),
    "CP2 x EP2": ("parallel.context=2", "parallel.expert=2"),
    "CP2 x TP2": ("parallel.context=2", "parallel.tensor=2"),
    "PP4": ("parallel.pipeline=4",),
    "TP2 x EP2 x PP2": ("parallel.tensor=2", "parallel.expert=2", "parallel.pipeline=2"),
    "DualPipe x EP2": (*DUAL, "parallel.expert=2"),
    "DualPipe x TP2": (*DUAL, "parallel.tensor=2"),
    "DualPipeV x DP2": ("parallel.pipeline=2", "parallel.schedule=dualpipev"),
    "interleaved x DP2": ("parallel.pipeline=2", "parallel.schedule=interleaved", "parallel.chunks=2"),
    "TP2 x EP2, by heads": ("parallel.tensor=2", "parallel.expert=2", *HEADS),
    "DualPipe x DP2, by heads": (*DUAL, *HEADS),
}
IN_FAST_LANE = ("DP4", "TP2 x expert-TP2", "CP2 x EP2", "DualPipe x EP2", "TP2 x EP2, by heads")


def by_heads(overrides):
    return HEADS[0] in overrides


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """What one process does, and the file of its gradients and weights: with matrices as published, and by heads."""
    folder = tmp_path_factory.mktemp("references")
    paths = {variant: str(folder / f"{variant}.pt") for variant in (False, True)}
    cases = [Case((*MUON, *(HEADS if v else ())), save_to=path, values=FAST) for v, path in paths.items()]
    found = run_ranks(1, train_rank, cases)
    return {variant: (result, path) for (variant, path), (result,) in zip(paths.items(), found)}


def case_of(references, overrides):
    return Case((*MUON, *overrides), reference=references[by_heads(overrides)][1], values=FAST)


def is_matrix(name):
    """Return whether Muon updates a parameter, in either variant."""
    return not any(part in name for part in ("norm", "embedding", "output_layer", "router"))


def worst_update(ranks, wanted=is_matrix):
    """Return the largest distance of a parameter's change from one process's, relative to it, and where."""
    return max(
        (error, name, rank)
        for rank, result in enumerate(ranks)
        for name, error in result["update_errors"].items()
        if wanted(name)
    )


@pytest.mark.parametrize("layouts", in_lanes(LAYOUTS, *IN_FAST_LANE))
def test_every_layout_updates_every_matrix_as_one_process_does(references, layouts):
    cases = [case_of(references, overrides) for overrides in layouts.values()]
    for (name, overrides), ranks in zip(layouts.items(), run_ranks(4, train_rank, cases)):
        check(name, ranks, references[by_heads(overrides)][0])
        assert worst_update(ranks) < (UPDATE,), (name, worst_update(ranks))
        assert worst_update(ranks, lambda name: not is_matrix(name)) < (1e-4,), name


def test_the_variants_are_not_the_same_update(references):
    """Else the table could not tell them apart."""
    one, other = (torch.load(references[variant][1])["updates"] for variant in (False, True))
    for part in ("linear_q_up_proj", "linear_kv_up_proj", "self_attention.linear_proj"):
        for name in (name for name in one if part in name):
            assert (one[name] - other[name]).norm() > 0.1 * one[name].norm(), name


# -- faults of others, planted ----------------------------------------------------------------------------------------


def with_fault(fault_and_case):
    """Train on this rank with a fault in the optimizer."""
    fault, case = fault_and_case
    whole, boxes, heads = matrices._gate_and_up, muon._boxes, muon.heads_of
    try:
        if fault == "parts of one parameter orthogonalised together":
            matrices._gate_and_up = matrices._whole
        elif fault == "another count of heads":  # the whole model's on a tensor-parallel rank
            muon.heads_of = lambda model: dataclasses.replace(heads(model), count=2 * model.num_attention_heads)
        elif fault == "a shard alone":
            muon._boxes = _each_alone
        return train_rank(case)
    finally:
        matrices._gate_and_up, muon._boxes, muon.heads_of = whole, boxes, heads


def _each_alone(share, table, shapes):
    """Return each of this rank's boxes as if it were a matrix."""
    found = []
    for held in _BOXES(share, table, {}):
        name = f"{held.box.matrix}, {share.start} {held.offset} of rank {torch.distributed.get_rank()}"
        shapes[name] = held.box.rows, held.box.columns
        found.append(held._replace(box=held.box._replace(matrix=name, row=0, column=0)))
    return found


_BOXES = muon._boxes
FAULTS = {
    "parts of one parameter orthogonalised together": ("parallel.expert=2",),
    "another count of heads": ("parallel.tensor=2", *HEADS),
    "a shard alone": (),
}


def test_faults_that_others_have_had_are_seen(references):
    cases = [(fault, case_of(references, overrides)) for fault, overrides in FAULTS.items()]
    for fault, ranks in zip(FAULTS, run_ranks(4, with_fault, cases)):
        error, name, _ = worst_update(ranks)
        assert error > 0.1, (fault, name, error)


# -- checkpoints -------------------------------------------------------------------------------------------------------

STEP = "step_00000002"
RESUMED = {
    "TP2 x EP2": (4, ("parallel.tensor=2", "parallel.expert=2")),
    "DualPipe x EP2": (4, (*DUAL, "parallel.expert=2")),
    "expert-TP2": (2, ("parallel.expert_tensor=2",)),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of step 2 of one process and what it does next; and one of AdamW."""
    folder = tmp_path_factory.mktemp("saved")
    words = (*MUON, "optim.ema_decay=0.5")
    adamw = tuple(word for word in words if word != "optim.name=muon")
    _, (then,), _ = run_ranks(1, live, [
        Life(words, save=folder / "muon"),
        Life(words, first=2, load=folder / "muon" / STEP),
        Life(adamw, save=folder / "adamw"),
    ])  # fmt: skip
    return folder, words, adamw, then


@pytest.mark.parametrize("layouts", in_lanes(RESUMED, "DualPipe x EP2"))
def test_a_run_resumes_in_another_layout(saved, tmp_path, layouts):
    folder, words, _, then = saved
    for name, (ranks, more) in layouts.items():
        place = tmp_path / name
        (found,) = run_ranks(ranks, live, [Life((*words, *more), first=2, load=folder / "muon" / STEP, save=place)])
        for rank in found:
            assert rank["notes"] == [] and rank["losses"] == pytest.approx(then["losses"], rel=1e-5)
            assert rank["norms"] == pytest.approx(then["norms"], rel=1e-4)
        assert_same_tensors(place / STEP, folder / "muon" / STEP)


def test_a_checkpoint_holds_momentum_of_matrices_and_moments_of_the_rest(saved):
    found = tensors(saved[0] / "muon" / STEP)
    for name in (name for name in found if not name.startswith(("optimizer.", "ema.")) and "bias" not in name):
        states = {key.split(".")[2] for key in found if key.startswith("optimizer.") and key.endswith(f".{name}")}
        by_muon = is_matrix(name) or "router" in name
        assert states == {"param", *(("momentum_buffer",) if by_muon else ("exp_avg", "exp_avg_sq"))}, name
        if by_muon:
            assert found[f"optimizer.state.momentum_buffer.{name}"].any(), name


def test_the_other_optimizer_begins_with_zeros_and_says_so(saved, tmp_path):
    folder, words, adamw, _ = saved
    asked = [
        Life(adamw, first=2, load=folder / "muon" / STEP, save=tmp_path / "adamw"),
        Life((*words, "parallel.pipeline=2"), first=2, load=folder / "adamw" / STEP, save=tmp_path / "muon"),
    ]
    to_adamw, to_muon = (found[0]["notes"] for found in run_ranks(2, live, asked))
    before = {name: tensors(folder / name / STEP) for name in ("adamw", "muon")}
    sizes = {k: v.numel() for k, v in before["muon"].items() if k.startswith("optimizer.state.momentum_buffer.")}
    count = f"{sum(sizes.values()):,} parameters that"
    assert to_adamw == [
        f"{count} Muon has updated in {folder / 'muon' / STEP} are updated by AdamW from here on: their moments begin "
        "with zeros"
    ]
    assert to_muon == [
        f"{count} AdamW has updated in {folder / 'adamw' / STEP} are updated by Muon from here on: their momentum "
        "begins with zeros"
    ]
    for name, of in (("adamw", "muon"), ("muon", "adamw")):
        now = tensors(tmp_path / name / STEP)
        for key, value in now.items():
            expected = before[of].get(key, torch.zeros_like(value))
            assert torch.equal(value, expected), key
