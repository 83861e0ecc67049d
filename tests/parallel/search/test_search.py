"""The search: never worse than the generators, deterministic, within its memory, and as good as is known."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.errors import ScheduleError
from parallel.pipeline.actions import Placement
from parallel.pipeline.simulator import Times, simulate
from parallel.pipeline.validate import validate
from parallel.schedules import make_schedule, placement
from parallel.search import RULES, cached_search, memory_bound, search
from parallel.search.annealing import anneal
from parallel.search.list_scheduling import list_schedule
from testing.lanes import examples

DEEPSEEK = {"forward": 57.0, "input_grad": 82.0, "weight_grad": 42.0, "overlapped": 140.0}


@st.composite
def problems(draw):
    kind, ranks = draw(st.sampled_from(["loop", "v", "mirror"])), draw(st.integers(1, 6))
    ranks += kind == "mirror" and ranks % 2
    stages = 2 * ranks if kind == "v" else ranks
    many = draw(st.integers(1, 14))
    cost = draw(st.lists(st.floats(0.5, 2), min_size=stages, max_size=stages))
    overlapped = draw(st.sampled_from([2.0, 2.5, 3.0]))
    times = Times.of(stages, cost=cost, overlapped=overlapped, send=draw(st.sampled_from([0.0, 0.25])))
    return Placement(kind, ranks, stages, many), times


@settings(deadline=None, max_examples=examples(80))
@given(problems(), st.sampled_from(RULES))
def test_a_rule_makes_a_valid_schedule_within_its_memory(problem, rule):
    where, times = problem
    cap = memory_bound(where)
    made = list_schedule("rule", where, times, rule, cap)
    if made is not None:
        validate(made)
        assert max(made.peak_microbatches) <= cap


@settings(deadline=None, max_examples=examples(80))
@given(problems(), st.sampled_from(RULES))
def test_a_bounded_rule_never_runs_into_the_memory_of_the_known_schedules(problem, rule):
    where, times = problem
    made = list_schedule("rule", where, times, replace(rule, bounded=True), memory_bound(where))
    assert made is not None
    validate(made)


def test_a_placement_on_which_every_other_rule_runs_into_its_memory_gets_a_schedule():
    where, times = Placement("mirror", 4, 4, 11), Times.of(4, overlapped=2.0, send=0.25)
    assert not any(list_schedule("rule", where, times, rule, memory_bound(where)) for rule in RULES)
    validate(search(where, times, evaluations=0).schedule)


@settings(deadline=None, max_examples=examples(15))
@given(problems())
def test_a_search_is_never_worse_than_the_generators(problem):
    where, times = problem
    found = search(where, times, evaluations=30)
    validate(found.schedule)
    assert max(found.schedule.peak_microbatches) <= memory_bound(where)
    names = {"loop": ["1f1b", "zb1p"], "v": ["dualpipev"], "mirror": ["dualpipe"]}[where.kind]
    for name in names:
        try:
            known = make_schedule(name, where.ranks, where.microbatches)
        except ScheduleError:
            continue
        assert simulate(found.schedule, times).makespan <= simulate(known, times).makespan + 1e-9


@pytest.mark.parametrize(("ranks", "many", "bound"), [(4, 8, 25), (8, 20, 63)])
def test_without_gain_from_overlap_the_lower_bound_is_reached(ranks, many, bound):
    assert bound == many * 3 + (ranks / 2 - 1) * 1
    found = search(placement("auto", ranks, many), Times.of(ranks), evaluations=0)
    assert simulate(found.schedule, Times.of(ranks)).makespan == bound
    assert not any(step.kind == "FB" for steps in found.schedule.ranks for step in steps)


def test_pairs_stay_where_overlap_gains():
    found = search(placement("auto", 8, 20), Times.of(8, **DEEPSEEK), evaluations=300)
    best_generator, best_rule = (dict(found.tried)[name] for name in ("dualpipe", "split"))
    assert found.tried[0][1] <= best_generator < best_rule
    pairs = [sum(step.kind == "FB" for step in steps) for steps in found.schedule.ranks]
    assert min(pairs) >= 8


def test_annealing_betters_dualpipe_over_unequal_stages_and_is_deterministic():
    times = Times.of(8, cost=[1.0] * 7 + [1.4], **DEEPSEEK)
    start = make_schedule("dualpipe", 8, 20)
    one, two = (anneal(start, times, 9, evaluations=1500, seed=3) for _ in range(2))
    assert one == two
    validate(one)
    assert max(one.peak_microbatches) <= 9
    assert simulate(one, times).makespan < 0.99 * simulate(start, times).makespan


def test_a_found_schedule_is_kept_and_a_damaged_file_found_anew(tmp_path):
    where, times = placement("auto", 4, 8), Times.of(4)
    first = cached_search(tmp_path, where, times, evaluations=5)
    (file,) = tmp_path.iterdir()
    assert cached_search(tmp_path, where, times, evaluations=5) == first
    file.write_text(file.read_text().replace("0F0", "0F1", 1))
    assert cached_search(tmp_path, where, times, evaluations=5) == first


def test_a_bound_too_small_is_one_line():
    with pytest.raises(ScheduleError, match="holds at most 0"):
        search(placement("auto", 4, 8), Times.of(4), cap=0)
