"""Watching a run changes nothing: whatever comes between its steps, losses, gradient norms, weights, moments and router
biases are, bit for bit, those of the run that nobody watches. And nothing piles up over the steps."""

from functools import cache

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from testing.ranks import TE, run_ranks
from testing.training.on_te import WORDS
from testing.training.watched import ALWAYS, Run, differences, objects_after, run_watched
from testing.training.watchers import WATCHERS

TENSOR_TILES = tuple(f"precision.fp8.{x}_tile=tensor" for x in ("activation", "weight", "gradient"))
DELAYED = ("precision=fp8", "precision.fp8.scaling=delayed", "precision.fp8.swiglu_cache=high", *TENSOR_TILES)
PRECISIONS = {
    "fp32": (),
    "bf16": ("precision=bf16",),
    "fp8": ("precision=fp8",),
    "fp8, delayed scaling": DELAYED,
    "te, bf16": (*WORDS, "precision=bf16"),
    "te, fp8": (*WORDS, "precision=fp8"),
    "te, fp8 held": (*WORDS, "precision=fp8_held"),
    "te, fp8, delayed scaling": (*WORDS, *DELAYED),
}
PAIR = "parallel.pipeline=2"
SCHEDULES = {
    "one rank": (1, ()),
    "one rank, recompute": (1, ("parallel.recompute=[full]",)),
    "EP 2": (2, ("parallel.expert=2",)),
    "1f1b": (2, (PAIR,)),
    "interleaved": (2, (PAIR, "parallel.schedule=interleaved")),
    "zb1p": (2, (PAIR, "parallel.schedule=zb1p")),
    "dualpipe": (2, (PAIR, "parallel.schedule=dualpipe")),
    "dualpipev": (2, (PAIR, "parallel.schedule=dualpipev")),
}
STEPS = 4
# Every watcher, in two orders. (To load back is to save first.)
ALL = (("evaluate", "score requests", "save beside"), ("measure memory", "load back"), ("load elsewhere", "report"))
ALL += (("export", "profile", "evaluate", "score requests"),)
ALL_BACKWARDS = tuple(names[::-1] for names in ALL[::-1])
WITH_AVERAGE = frozenset({"average", "report", "stragglers"})
EVERYTHING = frozenset(ALWAYS)


def outcomes(precision, schedule, **how):
    """Return every rank's outcome of a run."""
    ranks, overrides = SCHEDULES[schedule]
    preload = {"preload": TE} if precision.startswith("te") else {}
    (found,) = run_ranks(ranks, run_watched, [Run((*PRECISIONS[precision], *overrides), **how)], **preload)
    return found


unwatched = cache(outcomes)


def what_differs(precision, schedule, always, between, **how):
    """Return, by rank, in what a watched run differs from the unwatched one."""
    found = outcomes(precision, schedule, always=tuple(sorted(always)), between=between, **how)
    return [differences(*both) for both in zip(found, unwatched(precision, schedule), strict=True)]


PLANS = st.lists(st.sets(st.sampled_from(sorted(WATCHERS)), max_size=3), min_size=STEPS, max_size=STEPS)


def check(precision, schedule, always, between):
    for rank, wrong in enumerate(what_differs(precision, schedule, always, between)):
        assert not wrong, f"rank {rank}: {len(wrong)} differ, the first: {'; '.join(wrong[:5])}"


full = pytest.mark.full
CHOSEN = [
    ("bf16", "dualpipe", WITH_AVERAGE, ALL),
    pytest.param("te, fp8 held", "dualpipe", WITH_AVERAGE, ALL, marks=full),
    pytest.param("bf16", "one rank, recompute", EVERYTHING, ALL_BACKWARDS, marks=full),
    pytest.param("fp8", "dualpipev", WITH_AVERAGE, ALL_BACKWARDS, marks=full),
    pytest.param("fp32", "interleaved", WITH_AVERAGE, ALL, marks=full),
    pytest.param("fp8, delayed scaling", "zb1p", frozenset(), ALL, marks=full),
    pytest.param("te, fp8, delayed scaling", "EP 2", WITH_AVERAGE, ALL_BACKWARDS, marks=full),
]


@pytest.mark.parametrize(
    ("precision", "schedule", "always", "between"), CHOSEN, ids=lambda value: value if isinstance(value, str) else "-"
)
def test_watching_a_run_changes_nothing(precision, schedule, always, between):
    check(precision, schedule, always, between)


# Not shrunk: an example costs seconds, and the message says where the two runs part.
@full
@settings(
    deadline=None,
    max_examples=2,
    suppress_health_check=[HealthCheck.too_slow],
    phases=(Phase.reuse, Phase.generate),
)
@given(
    precision=st.sampled_from(sorted(PRECISIONS)),
    schedule=st.sampled_from(sorted(SCHEDULES)),
    always=st.sets(st.sampled_from(sorted(ALWAYS))),
    between=PLANS.map(lambda plan: tuple(tuple(sorted(names)) for names in plan)),
)
def test_watching_a_run_in_any_way_changes_nothing(precision, schedule, always, between):
    check(precision, schedule, always, between)


def test_one_bit_of_one_moment_is_seen():
    (wrong,) = what_differs("fp32", "one rank", (), ((),) * STEPS, flips_a_bit=True)
    assert wrong and all(text.startswith(("optimizer", "weight")) for text in wrong)


@pytest.mark.parametrize("steps", [(6, 12, 18), pytest.param((10, 25, 40), marks=full)])
def test_nothing_piles_up_over_the_steps(steps):
    ((early, middle, late),) = run_ranks(1, objects_after, [steps])[0]
    # What is made once, as caches of types are, grows in one half only.
    grown = {k: late[k] - middle[k] for k in late if late[k] > middle[k] + 5 and middle[k] > early[k] + 5}
    assert not grown, f"ever more objects over steps {steps}: {grown}"
