"""Schedules planned as if they overlapped: the same passes, that can run, with exchanges behind kernels."""

from collections import Counter

import pytest

from dsv3_megatron.planning.time.pairing import paired
from parallel.pipeline.actions import passes
from parallel.pipeline.simulator import Times, simulate
from parallel.schedules import make_schedule

PLAIN = [
    ("1f1b", 4, 12, 1),
    ("interleaved", 4, 12, 2),
    ("interleaved", 8, 16, 4),
    ("1f1b", 1, 3, 1),
    ("1f1b", 4, 2, 1),
    ("1f1b", 4, 1, 1),
]


@pytest.mark.parametrize(("name", "ranks", "microbatches", "chunks"), PLAIN)
def test_pairing_keeps_every_pass_in_its_order_and_runs(name, ranks, microbatches, chunks):
    plain = make_schedule(name, ranks, microbatches, chunks=chunks)
    together = paired(plain)
    for before, after in zip(plain.ranks, together.ranks):
        for kind in "FB":
            assert [p for p in passes(before) if p.kind == kind] == [p for p in passes(after) if p.kind == kind]
    simulate(together, Times.of(plain.stages))  # raises where ranks wait for each other for ever
    assert any(step.kind == "FB" for steps in together.ranks for step in steps) == (microbatches > 1)


def test_pairing_holds_one_microbatch_more_and_hides_what_overlaps():
    plain = make_schedule("interleaved", 4, 32, chunks=2)
    together = paired(plain)
    assert [a - b for a, b in zip(together.peak_microbatches, plain.peak_microbatches)] == [1] * 4
    hidden = Times.of(plain.stages, overlapped=2.0)  # of 3, run one after the other
    shorter = simulate(together, hidden).makespan / simulate(plain, hidden).makespan
    assert 2 / 3 < shorter < 0.85


def test_schedules_that_overlap_already_stay_as_they_are():
    for name in ("dualpipe", "dualpipev", "zb1p"):
        schedule = make_schedule(name, 4, 16)
        assert paired(schedule) is schedule
    assert Counter(step.kind for steps in make_schedule("dualpipe", 4, 16).ranks for step in steps)["FB"]
