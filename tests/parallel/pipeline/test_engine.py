"""The engine: right messages to right actions, no more live than proven, reductions in one order, hangs named."""

import pytest
import torch

from parallel.groups import start_processes
from parallel.pipeline.actions import passes
from parallel.pipeline.engine import Engine
from parallel.pipeline.simulator import Times
from parallel.pipeline.validate import validate
from parallel.pipeline.watchdog import Watchdog, process_group_store
from parallel.schedules import forward_only, make_schedule, placement
from parallel.schedules.dualpipev import dualpipev
from parallel.world import World
from testing.ranks import run_ranks
from testing.toy_stages import ToyStages

CASES = [
    ("1f1b", 4, 6, 1),
    ("interleaved", 4, 8, 3),
    ("zb1p", 4, 7, 1),
    ("dualpipe", 4, 12, 1),
    ("dualpipev", 4, 9, 1),
]


def run_toy(case):
    start_processes(World.from_environment(), torch.device("cpu"), timeout_seconds=60)
    try:
        schedule = make_schedule(*case)
        stages = ToyStages(schedule)
        engine = Engine(schedule, torch.distributed.group.WORLD, stages)
        for _ in range(2):  # an engine is made once and run every step
            stages.done.clear()
            stages.reduced.clear()
            engine.run()
        return stages.peak, list(map(str, stages.done)), stages.reduced, len(stages.live)
    finally:
        torch.distributed.destroy_process_group()


def test_every_schedule_runs_with_right_messages_and_proven_memory():
    for case, ranks in zip(CASES, run_ranks(4, run_toy, CASES)):
        schedule = make_schedule(*case)
        for rank, (peak, done, reduced, left) in enumerate(ranks):
            assert done == [str(part) for part in passes(schedule.ranks[rank])], case
            assert peak == schedule.peak_microbatches[rank], case
            assert sorted(reduced) == sorted(schedule.placement.stages_of(rank)), case
            assert left == 0


def test_ranks_that_hold_the_same_stages_reduce_them_in_the_same_order():
    (ranks,) = run_ranks(4, run_toy, [("dualpipe", 4, 12, 1)])
    assert ranks[0][2] == ranks[3][2] and ranks[1][2] == ranks[2][2]


def run_forward(case):
    start_processes(World.from_environment(), torch.device("cpu"), timeout_seconds=60)
    try:
        schedule = forward_only(placement(*case))
        stages = ToyStages(schedule)
        Engine(schedule, torch.distributed.group.WORLD, stages).run()
        return len(stages.done)
    finally:
        torch.distributed.destroy_process_group()


def test_evaluation_passes_every_microbatch_through_every_stage():
    cases = [("1f1b", 3, 4, 1), ("interleaved", 3, 5, 2), ("dualpipev", 3, 4, 1)]
    for case, ranks in zip(cases, run_ranks(3, run_forward, cases)):
        place = placement(*case)
        assert sum(ranks) == place.stages * place.microbatches
    (ranks,) = run_ranks(4, run_forward, [("dualpipe", 4, 5, 1)])
    assert sum(ranks) == 4 * 5


def run_hanging(hanging_rank):
    world = World.from_environment()
    start_processes(world, torch.device("cpu"), timeout_seconds=60)
    told = []
    watchdog = Watchdog(0.5, rank=world.rank, world_size=4, store=process_group_store(), report=told.append)
    schedule = make_schedule("1f1b", 4, 6)
    stages = ToyStages(schedule, hang_at="2B3" if world.rank == hanging_rank else None)
    try:
        # Unwatched: ranks connect with their neighbours, which can take longer than the time that is called a hang.
        Engine(schedule, torch.distributed.group.WORLD, ToyStages(schedule)).run()
        Engine(schedule, torch.distributed.group.WORLD, stages, watchdog).run()
        return told
    finally:
        watchdog.close()
        torch.distributed.destroy_process_group()


def test_a_hang_names_the_action_and_peer_of_every_rank():
    (ranks,) = run_ranks(4, run_hanging, [2])
    reports = [text for told in ranks for text in told]
    assert len(reports) == 1  # said once, by one rank
    (text,) = reports
    assert "hang: no action ended for 0.5 s" in text
    lines = {int(line.split()[1].rstrip(":")): line for line in text.splitlines()[1:]}
    assert "2B3 (stage 2 microbatch 3)" in lines[2] and "waits" not in lines[2]
    assert "waits for the gradient of microbatch 3 from pipeline rank 2" in lines[1]
    assert sorted(lines) == [0, 1, 2, 3]


def torch_dualpipev(ranks, many):
    """Return torch's own DualPipeV as text, one line per rank."""
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    theirs = object.__new__(schedules.ScheduleDualPipeV)
    theirs.pp_group_size, theirs._n_microbatches, theirs.num_stages = ranks, many, 2 * ranks
    theirs._num_stages, theirs.n_local_stages = 2 * ranks, 2
    orders = (theirs._calculate_single_rank_operations(rank) for rank in range(ranks))
    return "\n".join(",".join(str(action) for action in order if action is not None) for order in orders)


@pytest.mark.parametrize(("ranks", "many"), [(1, 2), (2, 4), (2, 7), (4, 8), (4, 20), (8, 33)])
def test_dualpipev_is_torchs_own_action_by_action(ranks, many):
    assert dualpipev(ranks, many).text() == torch_dualpipev(ranks, many)


def test_torchs_schedule_is_proven_by_our_validator():
    ours = dualpipev(4, 12)
    validate(type(ours).parse_text("dualpipev", ours.placement, torch_dualpipev(4, 12)))


def test_times_of_unequal_stages_scale_every_pass():
    times = Times.of(2, forward=1, input_grad=2, weight_grad=3, overlapped=3, cost=[1, 2])
    schedule = make_schedule("dualpipe", 2, 4)
    pair = next(step for step in schedule.ranks[0] if step.kind == "FB")
    assert times.duration(pair) == pytest.approx(0.5 * ((1, 2)[pair.forward.stage] + (5, 10)[pair.backward.stage]))
