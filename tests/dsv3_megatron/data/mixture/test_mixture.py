"""Mixtures of sources that change over a run: exact counts, random access, ends of sources."""

from collections import Counter
from fractions import Fraction
from math import ceil, floor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dsv3_megatron.data.mixture import order
from dsv3_megatron.data.mixture.blend import Blend
from dsv3_megatron.data.mixture.order import Mixture
from dsv3_megatron.data.mixture.phases import MixtureCurve, build_mixture, mixture_of, mixture_of_recipe
from dsv3_megatron.data.settings import DataSettings, MixturePhase
from dsv3_megatron.data.source.samples import Sample, step_batches
from launcher.command_line.compose import compose
from parallel.errors import DataError, RecipeError
from testing.lanes import examples

LENGTH = 8  # tokens of a sequence
weights = st.one_of(st.just(0.0), st.integers(1, 9).map(float), st.floats(0.01, 1))
tables = st.fixed_dictionaries({name: weights for name in "abcd"}).filter(lambda table: any(table.values()))


@st.composite
def curves(draw):
    """A mixture of up to three phases, some of whose ends lie inside a sequence."""
    phases, until = [], 0
    for index in range(draw(st.integers(1, 3))):
        until += draw(st.integers(1, 60 * LENGTH))
        shape = draw(st.sampled_from(["constant", "linear"]))
        at = draw(tables) if index == 0 or draw(st.booleans()) else None
        phases.append(MixturePhase(until=until, shape=shape, at=at, to=draw(tables) if shape == "linear" else None))
    used = {name for phase in phases for table in (phase.at, phase.to) for name, w in (table or {}).items() if w}

    def without_idle(table):
        return table and {name: weight for name, weight in table.items() if name in used}

    return build_mixture(
        [phase.model_copy(update={"at": without_idle(phase.at), "to": without_idle(phase.to)}) for phase in phases]
    )


def dues(curve, stop):
    """The exact integral of each source's share from its phase's first sample on, before every sample, phase by phase:
    [(first sample, [{source: due} of that sample and those after it, the phase's end included])]. Slow and plain."""
    found = []
    starts = [ceil(Fraction(p.start, LENGTH)) for p in curve.pieces]
    for piece, start, end in zip(curve.pieces, starts, [*starts[1:], None]):
        length = None if end is None else end - start
        rows = []
        for n in range((length if length is not None else max(0, stop - start)) + 1):
            row = {}
            for name in curve.names:
                a, b = piece.first.get(name, Fraction(0)), piece.last.get(name, Fraction(0))
                row[name] = a * n if not length else (a + a + (b - a) * Fraction(n, length)) / 2 * n
            rows.append(row)
        found.append((start, rows))
    return found


@settings(deadline=None, max_examples=examples(300))
@given(curves(), st.sampled_from([3, 16, 1 << 14]))
def test_at_every_sample_a_source_has_had_its_exact_share_rounded_up_or_down(curve, block):
    stop = 200
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "BLOCK", block)
        mixture = Mixture(curve, LENGTH)
        taken = [mixture.locate(n) for n in range(stop)]
    for source in range(len(curve.names)):  # every one of its samples, once, in order
        inner = [number for whose, number in taken if whose == source]
        assert inner == list(range(len(inner)))
    for start, rows in dues(curve, stop):
        had = Counter()
        for n, due in enumerate(rows):
            if start + n > stop:
                break
            assert sum(due.values()) == n
            for source, name in enumerate(curve.names):
                assert floor(due[name]) <= had[source] <= ceil(due[name]), (start, n, name)
            if start + n < stop:
                had[taken[start + n][0]] += 1


@settings(deadline=None, max_examples=examples(200))
@given(curves(), st.lists(st.integers(0, 250), min_size=1, max_size=8), st.sampled_from([3, 16, 64]))
def test_any_sample_is_found_without_those_before_it(curve, numbers, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "BLOCK", block)
        whole = Mixture(curve, LENGTH)
        one_by_one = [whole.locate(n) for n in range(251)]
        jumping = Mixture(curve, LENGTH)
        for number in numbers:
            assert jumping.locate(number) == one_by_one[number]
            assert Mixture(curve, LENGTH).locate(number) == one_by_one[number]
            had = Counter(source for source, _ in one_by_one[:number])
            assert jumping.counts(number) == [had[source] for source in range(len(curve.names))]
            assert jumping.number_of(*one_by_one[number]) == number


FAR = [
    MixtureCurve.constant({"a": 0.3, "b": 0.31, "c": 0.39}),
    MixtureCurve.constant({"a": 123_456_789, "b": 987_654_321, "c": 2345}),
    build_mixture(
        [
            MixturePhase(until="10T", at={"a": 0.7, "b": 0.3}),
            MixturePhase(until="35T", shape="linear", to={"b": 0.2, "c": 0.8}),
            MixturePhase(until="40T", shape="linear", to={"b": 1}),
        ]
    ),
]


@pytest.mark.parametrize("curve", FAR)
@pytest.mark.parametrize("number", [0, 10**9, 2_441_406_249, 2_441_406_250, 8_000_000_123, 10**10])
def test_ten_thousand_million_samples_on_no_unit_is_lost(curve, number):
    mixture = Mixture(curve, 4096)
    counts = mixture.counts(number)
    assert sum(counts) == number
    taken = [mixture.locate(n) for n in range(number, number + 40)]
    for sample, (source, inner) in enumerate(taken, start=number):
        assert inner == counts[source]
        assert mixture.number_of(source, inner) == sample
        counts[source] += 1
    starts = [ceil(Fraction(p.start, 4096)) for p in curve.pieces]
    exact = dict.fromkeys(curve.names, Fraction(0))
    for piece, start, end in zip(curve.pieces, starts, [*starts[1:], None]):
        if (n := min(number + 40, number + 40 if end is None else end) - start) <= 0:
            continue
        for name in curve.names:
            a, b = piece.first.get(name, Fraction(0)), piece.last.get(name, Fraction(0))
            exact[name] += a * n + ((b - a) * n * n / (2 * (end - start)) if end is not None else 0)
    for name, count in zip(curve.names, counts):  # each phase ends on a rounding of its own
        assert abs(count - exact[name]) < len(starts), name


@settings(deadline=None, max_examples=examples(30))
@given(st.lists(st.floats(0.05, 1), min_size=1, max_size=5), st.integers(0, 5 << 14))
def test_every_stretch_of_a_batch_holds_the_sources_in_their_shares(given, start):
    mixture = Mixture(MixtureCurve.constant(dict(zip("abcde", given))), LENGTH)
    had = Counter(mixture.locate(n)[0] for n in range(start, start + 300))
    assert all(abs(had[i] - 300 * w / sum(given)) < 2 for i, w in enumerate(given))


class Numbered:
    """A source whose sample number n holds n and its own number."""

    def __init__(self, source, count=10**9):
        self.source, self.count = source, count

    def sample(self, number):
        ids = np.asarray([self.source, number % self.count])
        return Sample(ids, ids + 1, np.ones(2, np.float32), np.zeros(2, np.int32))


def phased(count=10**9, at_source_end="repeat"):
    curve = build_mixture(
        [
            MixturePhase(until=40 * LENGTH, at={"a": 3, "b": 1}),
            MixturePhase(until=90 * LENGTH, shape="linear", to={"c": 1}),
        ]
    )
    return Blend({name: Numbered(i, count) for i, name in enumerate("abc")}, Mixture(curve, LENGTH), at_source_end)


def test_the_order_is_the_same_under_any_dp_and_after_a_resume():
    blend, batches = phased(), (8, 8, 16, 24, 32)  # a ramp
    whole = [blend.sample(n).tokens.tolist() for n in range(sum(batches))]
    for dp, micro in ((1, 1), (1, 4), (2, 2), (4, 1), (4, 2)):
        first, seen = 0, []
        resumed = phased()
        for batch in batches:
            for rank in range(dp):
                parts = step_batches(resumed, first=first, global_batch=batch, micro_batch=micro, dp_rank=rank, dp=dp)
                assert all(torch.equal(part["labels"], part["tokens"] + 1) for part in parts)
                seen += [row for part in parts for row in part["tokens"].tolist()]
            first += batch
            resumed = phased()  # what a resumed run knows is the number
        assert seen == whole, (dp, micro)


def test_epochs_are_told_where_a_source_begins_anew():
    blend = phased(count=20)
    inner = Counter()
    expected = []
    for n in range(150):
        source, number = blend.locate(n)
        inner[source] += 1
        if number and number % 20 == 0:
            expected.append(("abc"[source], number // 20 + 1, n))
    found = [(e.source, e.epoch, e.sample) for e in blend.epochs(0, 150)]
    assert found == expected and len(found) >= 3
    for cut in (1, 37, 70, 149):  # step by step they are the same
        assert [e for part in ((0, cut), (cut, 150)) for e in blend.epochs(*part)] == blend.epochs(0, 150)
    first = expected[0]
    stopping = phased(20, "stop")
    assert [stopping.samples_until_end(n) for n in (0, 5, first[2], 149)] == [first[2], first[2] - 5, 0, 0]
    assert (
        stopping.why_ended() == f"source a is read to its end after {first[2]} samples, and data.at_source_end = stop"
    )
    assert blend.samples_until_end(0) is None, "a source that is repeated ends nothing"
    (line, *_) = blend.told_epochs(150, LENGTH)
    assert (
        line == f"source a is read {inner[0] / 20:.1f} times: its second epoch begins after {first[2] * LENGTH} tokens"
    )
    assert phased().told_epochs(150, LENGTH) == [] and phased().epochs(0, 150) == []


def test_a_source_that_the_mixture_leaves_for_good_never_ends():
    curve = build_mixture([MixturePhase(until=10 * LENGTH, at={"a": 1}), MixturePhase(until=11 * LENGTH, at={"b": 1})])
    blend = Blend({"a": Numbered(0, 11), "b": Numbered(1, 30)}, Mixture(curve, LENGTH), "stop")
    assert blend.samples_until_end(0) == 40, "b alone comes to its end, after the ten of a"
    only_a = Blend({"a": Numbered(0, 11)}, Mixture(MixtureCurve.constant({"a": 2}), LENGTH), "stop")
    assert only_a.samples_until_end(3) == 8


def test_a_mixture_that_changes_what_was_read_already_is_told():
    web = MixturePhase(until=80 * LENGTH, at={"a": 3, "b": 1})
    kept = [web, MixturePhase(until=90 * LENGTH, at={"c": 1})]
    then, later = (Mixture(build_mixture(phases), LENGTH) for phases in ([web], kept))
    now = Mixture(MixtureCurve.constant({"a": 1, "c": 1}), LENGTH)
    assert order.moved(then, later, 80) == []
    assert order.moved(then, now, 80) == [
        "20 sequences of source a are read again", "40 sequences of source c are left out",
    ]  # fmt: skip


BAD = {
    "[]": ("no phase",),
    "[{until: 0, at: {a: 1}}]": ("data.mixture[0].until = 0", "remove the phase"),
    "[{until: 2M, at: {a: 1}}, {until: 1M, at: {b: 1}}]": ("data.mixture[1].until = 1M", "ends at 2M"),
    "[{until: 1M}]": ("data.mixture[0].at = null", "set data.mixture[0].at"),
    "[{until: 1M, at: {a: 1}, to: {b: 1}}]": ("data.mixture[0].to on a constant phase",),
    "[{until: 1M, at: {a: 1}, shape: linear}]": ("data.mixture[0].to = null",),
    "[{until: 1M, at: {a: 0}}]": ("data.mixture[0].at", "no source any weight"),
    "[{until: 1M, at: {a: 1, b: 0}}]": ("source b no weight in any phase", "leave it out"),
    "[{until: 1M, at: {a: 1, b: 1e-9}}]": ("data.mixture[0].at", "source b", "1.0e-09"),
    "[{until: 100 steps, at: {a: 1}}]": ("counts steps", "write tokens"),
    "[{until: 1M, at: {a: inf}}]": ("data.mixture[0].at.a", "finite"),
    "[{until: 1M, at: {a: 1}, weight: 2}]": ("weight",),
}


@pytest.mark.parametrize("mixture", BAD)
def test_a_mixture_that_cannot_be_is_one_line(mixture):
    with pytest.raises(RecipeError) as caught:
        compose(["data=indexed", "data.path=x", f"data.mixture={mixture}"])
    for part in BAD[mixture]:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_shipped_example_anneals_in_whole_numbers():
    data = compose(["recipe=dsv3_671b", "data=annealed", "data.path=shards"]).data
    mixture = Mixture(mixture_of_recipe(data), data.sequence_length)
    assert (mixture.names, data.sequence_length) == (["00_web", "01_code", "02_math", "03_textbooks"], 4096)
    ends = [-(-tokens // 4096) for tokens in (13 * 10**12, 14_300 * 10**9, 14_800 * 10**9)]
    counts = [mixture.counts(samples) for samples in (0, *ends)]
    shares = [(0.8, 0.15, 0.05, 0), (0.65, 0.225, 0.125, 0), (0.2, 0.3, 0.4, 0.1)]  # of the middle one the mean
    for before, after, first, stop, share in zip(counts, counts[1:], (0, *ends), ends, shares):
        assert all(abs(b - a - (stop - first) * s) < 1.01 for a, b, s in zip(before, after, share))


def test_a_mixture_belongs_to_shards_and_stands_alone():
    phases = ({"until": "1M", "at": {"a": 1}},)
    with pytest.raises(RecipeError, match="data.weights and data.mixture"):
        DataSettings(source="indexed", path="x", weights={"a": 1}, mixture=phases).check_source()
    with pytest.raises(DataError, match="data.mixture is for token shards, not stdlib"):
        DataSettings(mixture=phases).check_source()
    with pytest.raises(DataError, match="data.at_source_end = stop is for token shards"):
        DataSettings(at_source_end="stop").check_source()
    indexed = DataSettings(source="indexed", path="x", mixture=phases)
    with pytest.raises(DataError, match="data.mixture names a, but the sources are: b, c"):
        mixture_of(indexed, {"b": (None, 5), "c": (None, 6)})


def test_true_is_no_count_of_tokens():
    with pytest.raises(ValidationError, match="True is not a count"):
        MixturePhase(until=True, at={"a": 1})


def test_without_a_mixture_the_manifest_decides():
    plain = DataSettings(source="indexed", path="x")
    assert mixture_of(plain, {"a": (None, 30), "b": (None, 10)})(0) == {"a": 0.75, "b": 0.25}
    assert mixture_of(plain, {"a": (0.2, 30), "b": (0.8, 10)})(0) == {"a": 0.2, "b": 0.8}
    with pytest.raises(RecipeError, match="x/manifest.json: the weight of source b is 1.0e-08"):
        mixture_of(plain, {"a": (None, 10**8), "b": (None, 1)})
