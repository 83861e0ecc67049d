"""Every pipeline schedule trains as one process does: losses to 1e-5, every gradient to 1e-4, step after step."""

import pytest

from testing.lanes import in_lanes
from testing.ranks import run_ranks
from testing.training.one_process import check
from testing.training.tiny import Case, train_rank

EIGHT_LAYERS = ("model.num_hidden_layers=8", "optim.global_batch=16", "optim.micro_batch=1", "data.sequence_length=16")
SCHEDULES = {
    "1f1b": (),
    "interleaved": ("parallel.chunks=2",),
    "zb1p": (),
    "dualpipe": (),
    "dualpipev": (),
}
MTP = {0: "model.num_nextn_predict_layers=0", 1: "model.num_nextn_predict_layers=1"}


def cases(pipeline, expert):
    """Return every schedule with and without MTP at one layout: name -> (depth, overrides)."""
    return {
        f"{schedule} PP{pipeline} EP{expert} MTP{depth}": (
            depth,
            (
                *EIGHT_LAYERS,
                f"parallel.pipeline={pipeline}",
                f"parallel.expert={expert}",
                f"parallel.schedule={schedule}",
                setting,
                *more,
            ),
        )
        for schedule, more in SCHEDULES.items()
        for depth, setting in MTP.items()
    }


# Every schedule is in the fast lane, with MTP or without; DualPipe's two in both ways, with experts over ranks too.
FAST = (
    *(f"{schedule} PP2 EP1 MTP{number % 2}" for number, schedule in enumerate(SCHEDULES)),
    "dualpipe PP2 EP2 MTP0",
    "dualpipev PP2 EP2 MTP1",
    "dualpipe PP4 EP1 MTP1",
)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    asked = [Case((*EIGHT_LAYERS, MTP[d]), steps=2, save_to=str(folder / f"{d}.pt")) for d in MTP]
    return {d: (found[0], case.save_to) for d, found, case in zip(MTP, run_ranks(1, train_rank, asked), asked)}


def lanes():
    for pipeline, expert in ((2, 1), (2, 2), (4, 1), (4, 2)):
        every = cases(pipeline, expert)
        if pipeline * expert > 2:  # without MTP, DualPipe's two: more ranks cost more
            every = {n: case for n, case in every.items() if n.endswith("MTP1") or n.startswith("dualpipe")}
        for few_or_rest in in_lanes(every, *(name for name in FAST if name in every)):
            if few_or_rest.values[0]:
                name = f"PP{pipeline} EP{expert} {few_or_rest.id}"
                yield pytest.param(pipeline * expert, *few_or_rest.values, id=name, marks=few_or_rest.marks)


@pytest.mark.parametrize(("ranks", "asked"), lanes())
def test_every_schedule_trains_as_one_process(reference, ranks, asked):
    given = [Case(overrides, steps=2, reference=reference[depth][1]) for depth, overrides in asked.values()]
    for (name, (depth, _)), found in zip(asked.items(), run_ranks(ranks, train_rank, given)):
        check(name, found, reference[depth][0])


PIPELINE = ("parallel.pipeline=2",)
FEW = {
    "dualpipe, TP2 with sequence parallelism": (4, (*PIPELINE, "parallel.schedule=dualpipe", "parallel.tensor=2")),
    "zb1p, TP2 x EP2": (4, (*PIPELINE, "parallel.schedule=zb1p", "parallel.tensor=2", "parallel.expert=2")),
    "dualpipev, TP2 x EP2": (4, (*PIPELINE, "parallel.schedule=dualpipev", "parallel.tensor=2", "parallel.expert=2")),
    "dualpipe, DP2": (4, (*PIPELINE, "parallel.schedule=dualpipe", "optim.micro_batch=2")),
    "dualpipe, CP2, recompute": (
        4,
        (*PIPELINE, "parallel.schedule=dualpipe", "parallel.context=2", "parallel.recompute=[norm,mla_up,moe_act]"),
    ),
    "interleaved, CP2": (4, (*PIPELINE, "parallel.schedule=interleaved", "parallel.chunks=3", "parallel.context=2")),
    "dualpipe, recompute": (2, (*PIPELINE, "parallel.schedule=dualpipe", "parallel.recompute=[norm,mla_up,moe_act]")),
    "dualpipev, recompute": (
        2,
        (*PIPELINE, "parallel.schedule=dualpipev", "parallel.recompute=[attention,shared_experts,mlp]"),
    ),
    "dualpipe, uneven stages": (2, (*PIPELINE, "parallel.schedule=dualpipe", "parallel.stages=[3,5]")),
    "dualpipev on one rank": (1, ("parallel.schedule=dualpipev",)),
}


@pytest.mark.parametrize(
    "layouts",
    in_lanes(FEW, "dualpipe, CP2, recompute", "dualpipev, recompute", "dualpipev on one rank"),
)
def test_schedules_train_as_one_process_in_other_layouts_too(reference, layouts):
    for ranks in (1, 2, 4):
        asked = {
            name: Case((*EIGHT_LAYERS, *overrides), steps=2, reference=reference[1][1])
            for name, (many, overrides) in layouts.items()
            if many == ranks
        }
        for name, found in zip(asked, run_ranks(ranks, train_rank, list(asked.values())) if asked else ()):
            check(name, found, reference[1][0])


@pytest.mark.parametrize("schedules", in_lanes(SCHEDULES, "dualpipe", "zb1p"))
@pytest.mark.parametrize("depth", [pytest.param(2, marks=pytest.mark.full), 3])
def test_mtp_of_any_depth_trains_under_every_schedule(tmp_path, depth, schedules):
    setting = f"model.num_nextn_predict_layers={depth}"
    path = str(tmp_path / "reference.pt")
    ((expected,),) = run_ranks(1, train_rank, [Case((*EIGHT_LAYERS, setting), steps=2, save_to=path)])
    asked = {
        name: Case(
            (*EIGHT_LAYERS, setting, *PIPELINE, "parallel.expert=2", f"parallel.schedule={name}", *more),
            steps=2,
            reference=path,
        )
        for name, more in schedules.items()
    }
    for name, found in zip(asked, run_ranks(4, train_rank, list(asked.values()))):
        check(f"{name}, MTP {depth}", found, expected)


ONE_EXPERT_A_RANK = (
    "model.n_routed_experts=2",
    "model.num_experts_per_tok=1",
    "model.n_group=1",
    "model.topk_group=1",
    "model.num_hidden_layers=4",
    "data.sequence_length=16",
    "parallel.expert=2",
)
WAYS_TO_ONE_EXPERT = {
    "dualpipe": (*PIPELINE, "parallel.schedule=dualpipe", "optim.micro_batch=1"),
    "dualpipev": (*PIPELINE, "parallel.schedule=dualpipev", "optim.micro_batch=1"),
    "dualpipe, recompute": (
        *PIPELINE,
        "parallel.schedule=dualpipe",
        "optim.micro_batch=1",
        "parallel.recompute=[norm,moe_act,shared_experts]",
    ),
    "dualpipev, half an expert": ("parallel.schedule=dualpipev", "parallel.expert_tensor=2", "optim.micro_batch=1"),
}


@pytest.mark.parametrize("ways", in_lanes(WAYS_TO_ONE_EXPERT, "dualpipe, recompute", "dualpipev, half an expert"))
def test_a_rank_with_one_expert_trains_as_one_process(tmp_path, ways):
    """Nothing is sorted there: what the overlapped plan frees as a copy may be what the experts hold."""
    path = str(tmp_path / "reference.pt")
    whole = (*ONE_EXPERT_A_RANK[:-1], "optim.global_batch=8")
    ((expected,),) = run_ranks(1, train_rank, [Case(whole, steps=2, save_to=path)])
    asked = {
        name: Case((*ONE_EXPERT_A_RANK, "optim.global_batch=8", *more), steps=2, reference=path)
        for name, more in ways.items()
    }
    for name, found in zip(asked, run_ranks(4, train_rank, list(asked.values()))):
        check(name, found, expected)
