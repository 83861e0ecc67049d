"""Schedules: every generator is proven, and takes what its formula says; a broken schedule is always found."""

import random
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from parallel.errors import ScheduleError
from parallel.pipeline.actions import Action, Overlap, Placement, Schedule, parse
from parallel.pipeline.connections import connection_rounds, pairs_of
from parallel.pipeline.simulator import Times, simulate
from parallel.pipeline.transfers import Transfers
from parallel.pipeline.validate import validate
from parallel.schedules import SCHEDULES, forward_only, make_schedule, placement
from testing.lanes import examples


@st.composite
def schedules(draw):
    """Any generator at any size it takes."""
    name, ranks = draw(st.sampled_from(sorted(SCHEDULES))), draw(st.integers(1, 8))
    many, chunks = draw(st.integers(1, 24)), 1
    if name == "interleaved":
        chunks, many = draw(st.integers(1, 3)), ranks * draw(st.integers(1, 4))
    if name == "dualpipe":
        ranks += ranks % 2
        many = 2 * ranks + 2 * draw(st.integers(0, 6))
    if name == "dualpipev":
        many = 2 * ranks + draw(st.integers(0, 6))
    return make_schedule(name, ranks, many, chunks)


@settings(deadline=None, max_examples=examples(150))
@given(schedules())
def test_every_generator_and_its_evaluation_are_proven_at_every_size(schedule):
    validate(schedule)
    validate(forward_only(schedule.placement), evaluates=True)


@settings(deadline=None, max_examples=examples(60))
@given(schedules())
def test_the_text_form_parses_back(schedule):
    assert Schedule.parse_text(schedule.name, schedule.placement, schedule.text()) == schedule


def test_actions_are_written_as_torch_writes_them():
    from torch.distributed.pipelining.schedules import _Action

    for text in ("3F17", "0B2", "1I4", "1W4"):
        assert str(_Action.from_str(text)) == str(parse(text)) == text
    assert str(parse("(3F17;0B2)OVERLAP_F_B")) == "(3F17;0B2)OVERLAP_F_B"
    with pytest.raises(ValueError, match="is not an action"):
        parse("3X1")


# -- mutations: each breaks one rule -----------------------------------------------------------------------------------


def with_rank(schedule, rank, steps):
    ranks = list(schedule.ranks)
    ranks[rank] = tuple(steps)
    return replace(schedule, ranks=tuple(ranks))


def drop(schedule, rank, position, chance):
    steps = list(schedule.ranks[rank])
    del steps[position]
    return with_rank(schedule, rank, steps)


def double(schedule, rank, position, chance):
    steps = list(schedule.ranks[rank])
    steps.insert(chance.randrange(len(steps) + 1), steps[position])
    return with_rank(schedule, rank, steps)


def put_before_what_it_needs(schedule, rank, position, chance):
    """Move a backward or weight gradient before its forward or input gradient on the same rank."""
    steps = list(schedule.ranks[rank])
    step = steps[position]
    wanted = {"B": "F", "I": "F", "W": "I"}
    part = next((p for p in step.parts if p.kind in wanted), None)
    if part is None:
        return None
    for earlier, other in enumerate(steps):
        if Action(wanted[part.kind], part.stage, part.microbatch) in other.parts:
            steps.insert(earlier, steps.pop(position))
            return with_rank(schedule, rank, steps)
    raise AssertionError


def give_to_another_rank(schedule, rank, position, chance):
    if len(schedule.ranks) == 1:
        return None
    other = chance.choice([r for r in range(len(schedule.ranks)) if r != rank])
    step = schedule.ranks[rank][position]
    moved = with_rank(schedule, rank, [s for i, s in enumerate(schedule.ranks[rank]) if i != position])
    return with_rank(moved, other, [*moved.ranks[other], step])


def change_microbatch(schedule, rank, position, chance):
    if schedule.microbatches == 1:
        return None
    steps = list(schedule.ranks[rank])
    step = steps[position]
    part = step.parts[0]
    other = chance.choice([m for m in range(schedule.microbatches) if m != part.microbatch])
    changed = replace(part, microbatch=other)
    steps[position] = changed if isinstance(step, Action) else Overlap(changed, step.backward)
    return with_rank(schedule, rank, steps)


MUTATIONS = [drop, double, put_before_what_it_needs, give_to_another_rank, change_microbatch]


@settings(deadline=None, max_examples=examples(300))
@given(schedules(), st.sampled_from(MUTATIONS), st.integers(0, 2**32))
def test_a_broken_schedule_is_always_found(schedule, mutate, seed):
    chance = random.Random(seed)
    rank = chance.randrange(len(schedule.ranks))
    broken = mutate(schedule, rank, chance.randrange(len(schedule.ranks[rank])), chance)
    assume(broken is not None)
    with pytest.raises(ScheduleError):
        validate(broken)


@settings(deadline=None, max_examples=examples(100))
@given(schedules(), st.integers(0, 2**32))
def test_two_crossed_messages_are_always_found(schedule, seed):
    chance = random.Random(seed)
    transfers = Transfers.of(schedule)
    pairs = [(r, p) for r, queues in enumerate(transfers.queues) for p, queue in queues.items() if len(queue) > 1]
    assume(pairs)
    rank, peer = chance.choice(pairs)
    queue = list(transfers.queues[rank][peer])
    a, b = chance.sample(range(len(queue)), 2)
    queue[a], queue[b] = queue[b], queue[a]
    crossed = tuple(
        {**queues, peer: tuple(queue)} if r == rank else queues for r, queues in enumerate(transfers.queues)
    )
    with pytest.raises(ScheduleError, match="messages crossed"):
        validate(schedule, Transfers(crossed))


@settings(deadline=None, max_examples=examples(60))
@given(schedules(), st.integers(0, 2**32))
def test_queues_that_both_ends_agree_on_but_hang_are_found(schedule, seed):
    """The last message of a pair put first at both ends hangs, unless nothing depends on that."""
    transfers = Transfers.of(schedule)
    pairs = [(r, p) for r, qs in enumerate(transfers.queues) for p, q in qs.items() if r < p and len(q) > 1]
    assume(pairs)
    rank, peer = random.Random(seed).choice(pairs)
    queue = transfers.queues[rank][peer]
    late = queue[-1]
    assume(late.key.payload == "gradient" and late.key.microbatch != queue[0].key.microbatch)
    turned = (late, *queue[:-1])
    queues = [dict(qs) for qs in transfers.queues]
    queues[rank][peer] = queues[peer][rank] = turned
    with pytest.raises(ScheduleError, match="waits for ever"):
        validate(schedule, Transfers(tuple(queues)))


# -- connections: the first message of two ranks holds their hosts -----------------------------------------------------


@pytest.mark.parametrize("ranks", range(1, 18))
@pytest.mark.parametrize("kind", ["loop", "v", "mirror"])
def test_every_pair_connects_once_in_three_rounds_at_most(kind, ranks):
    for chunks in (1, 2, 3) if kind == "loop" else (1,):
        place = Placement(kind, ranks, 2 * ranks if kind == "v" else ranks * chunks, 2 * ranks)
        rounds = connection_rounds(pairs_of(place))
        assert len(rounds) <= 3
        for pairs in rounds:
            assert len({rank for pair in pairs for rank in pair}) == 2 * len(pairs), "a rank with two partners"
        used = {
            (min(rank, peer), max(rank, peer))
            for rank, queues in enumerate(Transfers.of(forward_only(place)).queues)
            for peer in queues
        }
        assert sorted(pair for pairs in rounds for pair in pairs) == sorted(used)


@pytest.mark.parametrize("ranks", [3, 4, 5, 8])
def test_a_schedule_whose_ranks_have_not_connected_is_refused_where_it_hangs(ranks):
    schedule = make_schedule("interleaved", ranks, 2 * ranks, 2)
    apart = ((),) * ranks
    waits = rf"rank 0, action 0: waits for ever with the first message between it and rank {ranks - 1}, the activation"
    with pytest.raises(ScheduleError, match=waits):
        validate(schedule, connections=apart)
    with pytest.raises(ScheduleError, match=waits):
        validate(forward_only(schedule.placement), connections=apart, evaluates=True)
    validate(make_schedule("1f1b", ranks, 2 * ranks), connections=apart)  # its first messages come in a line


def test_connections_that_wait_in_a_circle_are_refused():
    schedule = make_schedule("interleaved", 3, 6, 2)
    with pytest.raises(ScheduleError, match="rank 0, action 0: waits for ever to connect with rank 1"):
        validate(schedule, connections=((1, 2), (2, 0), (0, 1)))


def test_a_reduction_that_two_ranks_start_in_places_that_wait_for_each_other_is_refused(monkeypatch):
    """The first reduction over a group that has not connected holds its members' hosts until the last has come."""
    schedule = make_schedule("dualpipe", 4, 8)
    validate(schedule, groups_connected=False)
    last = len(schedule.ranks[3]) - 1
    monkeypatch.setattr(
        "parallel.pipeline.validate.reductions", lambda _, rank: {0: {0: [0]}, 3: {last: [0]}}.get(rank, {})
    )
    with pytest.raises(ScheduleError, match="waits for ever to reduce stage 0 with rank 3"):
        validate(schedule, groups_connected=False)
    validate(schedule)


# -- published formulae ------------------------------------------------------------------------------------------------

F = W = 1.0
B = 2.0  # input gradient and weight gradient, 1 each


def timeline(name, ranks, many, overlapped=None, chunks=1):
    schedule = make_schedule(name, ranks, many, chunks)
    return simulate(
        schedule, Times.of(schedule.stages, forward=F, input_grad=B - W, weight_grad=W, overlapped=overlapped)
    )


@pytest.mark.parametrize(("ranks", "many"), [(2, 4), (4, 8), (8, 20), (16, 120)])
def test_1f1b_and_zb1p_idle_as_their_formulae_say(ranks, many):
    assert timeline("1f1b", ranks, many).bubble == pytest.approx([(ranks - 1) * (F + B)] * ranks)
    assert max(timeline("zb1p", ranks, many).bubble) == pytest.approx((ranks - 1) * (F + B - 2 * W))


@pytest.mark.parametrize("overlapped", [2.5, 3.0])
@pytest.mark.parametrize(("ranks", "many"), [(2, 4), (4, 8), (8, 20), (16, 120)])
def test_dualpipe_and_dualpipev_idle_as_their_formula_says(ranks, many, overlapped):
    dual = timeline("dualpipe", ranks, many, overlapped)
    assert max(dual.bubble) == pytest.approx((ranks / 2 - 1) * (overlapped + B - 3 * W))
    folded = timeline("dualpipev", ranks // 2, many, overlapped)  # as many stages on half the ranks
    assert max(folded.bubble) == pytest.approx((ranks / 2 - 1) * (overlapped + B - 3 * W))


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_interleaving_divides_the_bubble_by_its_chunks(chunks):
    # A chunk is 1 / chunks of a rank's share, so its F and B are too.
    assert max(timeline("interleaved", 4, 16, chunks=chunks).bubble) == pytest.approx((4 - 1) * (F + B))


def test_deepseeks_own_times_give_the_independent_simulations_figures():
    schedule = make_schedule("dualpipe", 16, 120)
    found = simulate(schedule, Times.of(16, forward=57, input_grad=82, weight_grad=42, overlapped=140))
    assert (found.makespan, max(found.bubble)) == (18406, 909)


@pytest.mark.parametrize(
    ("name", "ranks", "many", "peak"),
    [("1f1b", 8, 20, 8), ("zb1p", 8, 20, 8), ("dualpipe", 8, 20, 9), ("dualpipev", 4, 20, 9), ("1f1b", 8, 3, 3)],
)
def test_memory_peaks_are_the_papers(name, ranks, many, peak):
    assert max(make_schedule(name, ranks, many).peak_microbatches) == peak


def test_messages_that_take_time_delay_the_step():
    alone = make_schedule("1f1b", 4, 1)  # one microbatch passes every boundary twice
    assert simulate(alone, Times.of(4, send=0.5)).makespan == pytest.approx(4 * (F + B) + 2 * 3 * 0.5)


# -- what users can get wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dualpipe", 3, 12), "pipeline = 3 is odd, but dualpipe pairs ranks; use 2 or 4"),
        (("dualpipe", 4, 9), "microbatches = 9 is odd.*use 10"),
        (("dualpipe", 4, 6), "microbatches = 6 is below 2 x pipeline = 8.*use 8"),
        (("dualpipev", 4, 6), "microbatches = 6 is below 2 x pipeline = 8.*use 8"),
        (("interleaved", 4, 6, 2), "microbatches = 6 is not a multiple of pipeline = 4.*use 8"),
        (("dualpip", 4, 8), "did you mean dualpipe"),
        (("1f1b", 4, 8, 2), "chunks = 2 belongs to name=interleaved"),
        (("1f1b", 0, 8), "use 1 or more"),
    ],
)
def test_what_cannot_be_made_is_one_line(arguments, message):
    with pytest.raises(ScheduleError, match=message):
        make_schedule(*arguments)


def test_a_time_below_zero_is_one_line():
    with pytest.raises(ScheduleError, match=r"times\.send = -1"):
        Times.of(4, send=-1)


def test_schedules_need_no_torch():
    code = (
        "import sys, launcher.schedule; "
        "launcher.schedule.main(['name=dualpipe', 'pipeline=4', 'microbatches=8']); assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("make", [make_schedule, placement])
@pytest.mark.parametrize("size", [(2, 10**9), (10**9, 2 * 10**9), (1000, 1001)])
def test_a_schedule_too_large_to_be_listed_is_refused_at_once(make, size):
    with pytest.raises(ScheduleError, match="more than 1,000,000 passes"):
        make("1f1b", *size)
