"""The model of failures and saves: against a simulation that knows nothing of it, and against published formulae."""

import random
from dataclasses import replace
from itertools import pairwise
from math import inf

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dsv3_megatron.planning.goodput.model import Save, best_intervals, daly_interval, useful_share, young_interval

DAY = 86400.0


def simulated(failures_per_second, saves, intervals, *, failures, seed=1):
    """Return the useful share of a run, simulated event by event, until so many failures have come."""
    choice = random.Random(seed)
    clock, done = 0.0, 0.0  # seconds of the wall's clock, and of training that are not lost
    kept = [0.0] * len(saves)  # training that the newest complete save of each kind holds
    fails = choice.expovariate(failures_per_second)
    for _ in range(failures):
        pending = [[] for _ in saves]  # (clock at which it is complete, training that it holds)
        due = [max(done, held + interval) for held, interval in zip(kept, intervals)]
        while True:  # one stretch of training after the other, until the failure
            kind = min(range(len(saves)), key=lambda k: due[k])
            ready = [pending[k][-1][0] if pending[k] else 0.0 for k in range(len(saves))]
            begins = max(clock + due[kind] - done, ready[kind])  # one at a time
            if begins + saves[kind].stall_seconds > fails:
                break
            done = due[kind]
            clock = begins + saves[kind].stall_seconds
            pending[kind].append((begins + saves[kind].seconds, done))
            due[kind] = done + intervals[kind]
        for k in range(len(saves)):
            kept[k] = max([kept[k], *(held for ready, held in pending[k] if ready <= fails)])
        pick, kind = choice.random(), 0
        while kind < len(saves) - 1 and pick >= saves[kind].share:
            pick, kind = pick - saves[kind].share, kind + 1
        done = max(kept[kind:])  # a more durable kind may be the newer one
        kept[:kind] = [done] * kind  # what was lost is there again once the run goes on
        kept = [min(held, done) for held in kept]
        clock, fails = fails, fails + choice.expovariate(failures_per_second)
        while clock + saves[kind].recovery_seconds > fails:  # it fails while it recovers, and begins that again
            clock, fails = fails, fails + choice.expovariate(failures_per_second)
        clock += saves[kind].recovery_seconds
    return done / clock


# Of failures, saves, recoveries: seconds that an hour between failures is long against, or short.
@pytest.mark.parametrize("interval", [150.0, 900.0, 5400.0])
@pytest.mark.parametrize(("stall", "beside"), [(0.0, 0.0), (0.0, 400.0), (30.0, 0.0), (30.0, 100.0), (300.0, 2000.0)])
def test_a_simulated_run_is_useful_for_the_predicted_share(interval, stall, beside):
    save, rate = Save(stall, stall + beside, recovery_seconds=200.0 + stall), 1 / 3600
    found = simulated(rate, [save], [interval], failures=4000)
    assert found == pytest.approx(useful_share(rate, [save], [interval]), abs=0.01)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
@pytest.mark.parametrize(("often", "seldom"), [(150.0, 900.0), (600.0, 3000.0)])
def test_two_kinds_of_save_are_simulated_too(share, often, seldom):
    memory, disk = Save(2.0, 5.0, 60.0, share), Save(10.0, 60.0, 160.0, 1 - share)
    found = simulated(1 / 3600, [memory, disk], [often, seldom], failures=4000)
    assert found == pytest.approx(useful_share(1 / 3600, [memory, disk], [often, seldom]), abs=0.01)


@settings(max_examples=60, deadline=None)
@given(
    hours=st.floats(0.1, 1000),
    stall=st.floats(0.01, 120),
    recovery=st.floats(0, 1800),
    factor=st.floats(0.2, 5).filter(lambda f: abs(f - 1) > 0.05),
)
def test_no_other_interval_is_better_than_dalys(hours, stall, recovery, factor):
    rate, save = 1 / (3600 * hours), Save(stall, stall, recovery)
    best = daly_interval(rate, stall)
    assume(
        stall * rate < 0.1
    )  # where Daly's series is good to a thousandth of the share; saves that cost more are none
    mine, other = (useful_share(rate, [save], [seconds]) for seconds in (best, best * factor))
    assert mine >= other - 1e-4


@settings(max_examples=60, deadline=None)
@given(
    hours=st.floats(0.1, 1000),
    stall=st.floats(0, 120),
    beside=st.floats(0, 600),
    recovery=st.floats(0, 1800),
    interval=st.floats(1, 1e5),
    share=st.floats(0, 1),
    worse=st.floats(1.0, 3.0),
)
def test_what_is_worse_makes_the_share_smaller_and_it_stays_a_share(
    hours, stall, beside, recovery, interval, share, worse
):
    rate = 1 / (3600 * hours)
    saves = [Save(stall, stall + beside, recovery, share), Save(2 * stall, 3 * beside + 2 * stall, recovery, 1 - share)]
    intervals = [interval, 4 * interval]
    found = useful_share(rate, saves, intervals)
    assert 0.0 <= found <= 1.0
    slower = [replace(s, stall_seconds=worse * s.stall_seconds, seconds=worse * s.seconds) for s in saves]
    later = [replace(s, recovery_seconds=worse * s.recovery_seconds) for s in saves]
    for other in (
        useful_share(rate * worse, saves, intervals),
        useful_share(rate, slower, intervals),
        useful_share(rate, later, intervals),
    ):
        assert other <= found + 1e-12


def test_rare_failures_agree_with_young_and_frequent_ones_with_daly():
    assert daly_interval(1e-9, 10.0) == pytest.approx(young_interval(1e-9, 10.0), rel=1e-3)
    assert daly_interval(1 / 100, 200.0) == 100.0  # a save takes longer than two failures are apart
    assert daly_interval(0.0, 10.0) == young_interval(0.0, 10.0) == inf
    ends = [daly_interval(1 / 1000, 2000 - step) for step in (1e-6, 0.0)]
    assert max(ends) / min(ends) < 1.25  # the two branches of the estimate meet, as far as they do in the paper


def test_where_nothing_fails_saves_alone_cost_time():
    assert useful_share(0.0, [Save(1.0, 50.0, 600.0)], [99.0]) == 0.99
    assert useful_share(0.0, [Save(1.0, 50.0, 600.0)], [inf]) == 1.0
    assert useful_share(1 / DAY, [Save(1.0, 50.0, 600.0)], [inf]) == 0.0  # what is never saved is lost every time
    assert useful_share(1.0, [Save(1.0, 1.0, 1.0)], [1e9]) == 0.0  # far too large for exp


def test_no_save_begins_before_the_last_is_written():
    cheap = Save(0.1, 300.0, 60.0)
    assert best_intervals(1 / DAY, [cheap]) == [cheap.beside_seconds]
    assert useful_share(0.0, [cheap], [10.0]) == pytest.approx(10 / 300)


def test_a_second_kind_is_for_the_failures_that_the_first_does_not_survive():
    memory, disk = Save(0.2, 2.0, 300.0, 0.95), Save(0.2, 40.0, 640.0, 0.05)
    both = best_intervals(1 / DAY, [memory, disk])
    assert all(a < b for a, b in pairwise(both))
    alone = replace(disk, share=1.0)
    assert useful_share(1 / DAY, [memory, disk], both) > useful_share(
        1 / DAY, [alone], best_intervals(1 / DAY, [alone])
    )
    assert best_intervals(1 / DAY, [replace(memory, share=1.0), replace(disk, share=0.0)])[1] == inf
