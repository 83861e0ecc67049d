"""Packing, fill-in-the-middle, blends and the order of packed samples."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.data.checked.shards import CheckedShards
from dsv3_megatron.data.mixture.blend import Blend
from dsv3_megatron.data.mixture.order import Mixture
from dsv3_megatron.data.mixture.phases import MixtureCurve
from dsv3_megatron.data.source.fim import Middle, restored
from dsv3_megatron.data.source.indexed import PackedShards
from dsv3_megatron.data.source.open_files import OpenFiles
from dsv3_megatron.data.source.packing import PackingRule, best_fit, cut, pack
from dsv3_megatron.data.source.packing_files import OpenPacking, PackingFiles, make_ready, seal
from dsv3_megatron.data.source.samples import Sample, step_batches
from dsv3_megatron.data.source.shard_table import open_table, write_table
from dsv3_megatron.data.source.shards import Manifest, ShardWriter, Source
from testing.lanes import examples

START, END, PAD = 0, 1, 2
FIM = Middle(begin=4, hole=3, end=5)


def slow_best_fit(lengths, capacity):
    """Best-fit decreasing, one piece at a time: returns how full each bin is."""
    room = []
    for length in sorted(lengths, reverse=True):
        fitting = [r for r in room if r >= length]
        if fitting:
            room[room.index(min(fitting))] -= length
        else:
            room.append(capacity - length)
    return sorted(room)


@settings(deadline=None, max_examples=examples(300))
@given(st.lists(st.integers(1, 30), max_size=120), st.integers(30, 40))
def test_fast_best_fit_fills_bins_as_the_slow_one_does(lengths, capacity):
    bins = best_fit(np.asarray(lengths, dtype=np.int64), capacity)
    filled = np.bincount(bins, weights=lengths).astype(int) if lengths else np.zeros(0, int)
    assert (filled <= capacity).all() and (filled > 0).all()
    assert sorted(capacity - filled) == slow_best_fit(lengths, capacity)


@settings(deadline=None, max_examples=examples(200))
@given(st.lists(st.integers(1, 200), min_size=1, max_size=60), st.integers(1, 64))
def test_pieces_cover_every_place_of_every_document_once(lengths, capacity):
    document, offset, length = cut(np.asarray(lengths), capacity)
    covered = [np.zeros(n, int) for n in lengths]
    for d, o, n in zip(document, offset, length):
        covered[d][o : o + n] += 1
    assert all((c == 1).all() for c in covered) and length.max() <= capacity
    short = [d for d, n in enumerate(lengths) if n <= capacity]
    assert all((document == d).sum() == 1 for d in short), "a document that fits is never cut"


def test_real_lengths_leave_hardly_a_place_empty():
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(6, 1.3, 20_000).astype(int), 1, None)  # documents of a few hundred tokens
    packing = pack(lengths, PackingRule(4096), bytes(32))
    waste = 1 - lengths.sum() / ((len(packing.starts) - 1) * 4096)
    assert 0 <= waste < 0.002


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three sources of random documents; tokens are unique in the first 200 so that each can be told."""
    folder = tmp_path_factory.mktemp("shards")
    random = np.random.default_rng(3)
    found, written = {}, []
    for source in ("a", "b", "c"):
        documents = [random.integers(6, 60_000, size=n) for n in random.integers(1, 90, size=150)]
        writer = ShardWriter(folder, f"{source}/train_00000", 60_000)
        documents = [np.append(d, END).astype(np.int32) for d in documents]
        writer.add(documents[:100])
        second = ShardWriter(folder, f"{source}/train_00001", 60_000)
        second.add(documents[100:])
        found[source] = documents
        written += [writer.commit(), second.commit()]
    sources, digest = write_table(folder, [Source(name=name, input=name) for name in found], written)
    manifest = Manifest(
        tokenizer_sha256="", vocab_size=60_000, options={}, sources=sources, table_sha256=digest, has_sums=True
    )
    return folder, open_table(folder, manifest), found


def packed(shards, source, *, fim_rate=0.0, isolate=False, seed=1, length=64, place=None, **more):
    folder, table, found = shards
    number = list(found).index(source)
    rule = PackingRule(length, fim_rate, FIM if fim_rate else None)
    files = PackingFiles(folder, place or folder / "packing", table, "digest", 60_000, number, "train", rule)
    make_ready([files])
    seal([files])
    opened = OpenFiles()
    return PackedShards(
        [OpenPacking(files, opened)],
        name=source,
        seed=seed,
        start_token=START,
        pad_token=PAD,
        isolate=isolate,
        shards=CheckedShards(folder, table, 60_000, opened),
        **more,
    )


def documents_of(samples):
    """Return the target streams in samples, pieces of a cut document joined where one follows from the other."""
    pieces = []
    for sample in samples:
        for number in np.unique(sample.documents):
            here = (sample.documents == number) & (sample.weights > 0)
            if here.any():
                pieces.append((sample.tokens[here], sample.labels[here]))
    return pieces


@pytest.mark.parametrize("fim_rate", [0.0, 0.4, 1.0])
def test_every_token_is_a_target_exactly_once_an_epoch(shards, fim_rate):
    source = packed(shards, "a", fim_rate=fim_rate, isolate=True)
    samples = [source.sample(n) for n in range(source.count)]
    pieces = documents_of(samples)
    whole, torn = [], []
    for tokens, labels in pieces:
        assert (tokens[1:] == labels[:-1]).all(), "inputs are the targets one place later"
        (whole if tokens[0] == START and labels[-1] == END else torn).append((tokens, labels))
    by_input = {int(tokens[0]): (tokens, labels) for tokens, labels in torn if tokens[0] != START}
    for tokens, labels in (t for t in torn if t[0][0] == START):
        while labels[-1] != END:
            labels = np.append(labels, by_input.pop(int(labels[-1]))[1])
        whole.append((tokens, labels))
    assert not by_input
    found = sorted(restored(labels, FIM).tolist() for _, labels in whole)
    assert found == sorted(d.tolist() for d in shards[2]["a"])
    rearranged = sum(labels[0] == FIM.begin for _, labels in whole)
    assert abs(rearranged / 150 - fim_rate) < 0.12


@settings(deadline=None, max_examples=examples(200))
@given(st.lists(st.integers(6, 99), min_size=0, max_size=40), st.integers(0, 1000))
def test_fill_in_the_middle_is_prefix_suffix_middle_and_can_be_undone(tokens, document):
    original = np.asarray([*tokens, END])
    first, second = FIM.cuts(len(tokens), document, bytes(32))
    assert 0 <= first <= second <= len(tokens)
    stream = []
    for segment in FIM.segments(len(original), (first, second)):
        stream += [segment] if isinstance(segment, int) else original[slice(*segment)].tolist()
    expected = [4, *tokens[:first], 3, *tokens[second:], 5, *tokens[first:second], END]
    assert stream == expected
    assert restored(np.asarray(stream), FIM).tolist() == original.tolist()


def test_epochs_hold_the_same_samples_in_another_order(shards):
    source = packed(shards, "b")
    first = [source.sample(n).labels.tolist() for n in range(source.count)]
    second = [source.sample(source.count + n).labels.tolist() for n in range(source.count)]
    assert first != second and sorted(first) == sorted(second)


def test_a_packing_is_made_once_and_serves_every_seed(shards, monkeypatch):
    before = [packed(shards, "c").sample(n).tokens.tolist() for n in range(5)]
    monkeypatch.setattr("dsv3_megatron.data.source.packing_files.pack", None)  # a second making would fail
    assert [packed(shards, "c").sample(n).tokens.tolist() for n in range(5)] == before
    other = packed(shards, "c", seed=2)
    assert [other.sample(n).tokens.tolist() for n in range(5)] != before
    mine = packed(shards, "c")
    every = [sorted(source.sample(n).tokens.tolist() for n in range(source.count)) for source in (mine, other)]
    assert every[0] == every[1], "a seed orders sequences, and does not change them"


def test_the_order_of_samples_is_the_same_under_any_dp_and_after_a_resume(shards):
    mixture = Mixture(MixtureCurve.constant({"a": 0.5, "b": 0.3, "c": 0.2}), 64)
    blend = Blend({name: packed(shards, name, fim_rate=0.3, isolate=True) for name in "abc"}, mixture)

    def rows(samples):
        return [tuple(getattr(s, field).tolist() for field in ("tokens", "labels", "documents")) for s in samples]

    def step(first, batch, dp, micro):
        found = []
        for rank in range(dp):
            for part in step_batches(blend, first=first, global_batch=batch, micro_batch=micro, dp_rank=rank, dp=dp):
                found += zip(*(part[field].tolist() for field in ("tokens", "labels", "documents")))
        return found

    batches = (8, 8, 16, 24)  # a ramp
    whole = rows(blend.sample(n) for n in range(sum(batches)))
    for dp, micro in ((1, 1), (1, 4), (2, 2), (4, 1), (4, 2)):
        first, seen = 0, []
        for batch in batches:
            seen += step(first, batch, dp, micro)
            first += batch
        assert seen == whole, (dp, micro)
    fresh = Blend({name: packed(shards, name, fim_rate=0.3, isolate=True) for name in "abc"}, mixture)
    for resumed_at in range(0, sum(batches), 5):  # what a resumed run knows is this number
        assert rows([fresh.sample(resumed_at)]) == [whole[resumed_at]]


def test_windows_that_are_isolated_end_where_a_document_ends():
    sample = Sample.of_ids(np.asarray([7, 8, END, 9, END, 10, 11]), end=END)
    assert sample.documents.tolist() == [0, 0, 0, 1, 1, 2]
    assert sample.weights.tolist() == [1, 1, 0, 1, 0, 1]
