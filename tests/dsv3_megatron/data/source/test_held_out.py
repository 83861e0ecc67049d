"""Which held-out sequences are evaluated: of every source its share, and no other text than the rest."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.data.prepare.shard import PrepareOptions, prepare
from dsv3_megatron.data.settings import DataSettings
from dsv3_megatron.data.source.build import build
from dsv3_megatron.data.source.held_out import HeldOut, HeldOutSource, apportioned
from dsv3_megatron.data.tokenizer import Tokenizer

SOURCES = st.lists(st.integers(1, 10_000), min_size=1, max_size=12)


@given(st.integers(1, 500), SOURCES)
def test_every_source_gets_its_share_and_one_at_least(total, available):
    found = apportioned(total, available)
    assert all(1 <= count <= have for count, have in zip(found, available))
    assert sum(found) == min(sum(available), max(total, len(available)))
    lone = sum(count == 1 for count in found)
    for count, have in zip(found, available):  # those with more than one share what those with one leave, evenly
        assert count == 1 or abs(count - min(total / sum(available), 1) * have) <= 1 + lone


def test_shares_follow_largest_remainders():
    assert apportioned(64, [6000, 3000, 1000]) == [38, 19, 7]  # 38.4, 19.2, 6.4
    assert apportioned(10, [9990, 5, 5]) == [8, 1, 1]
    assert apportioned(2, [50, 5, 5]) == [1, 1, 1]
    assert apportioned(100, [3, 4]) == [3, 4]


@given(st.integers(1, 40), SOURCES)
def test_numbers_run_through_the_sources_one_after_another(total, available):
    def named(source):
        return SimpleNamespace(sample=lambda number: (source, number))

    held_out = HeldOut([HeldOutSource(str(n), named(n), have) for n, have in enumerate(available)], total)
    counts = apportioned(total, available)
    expected = [(source, number) for source, count in enumerate(counts) for number in range(count)]
    assert [held_out.sample(n) for n in range(held_out.count)] == expected
    assert {name: len(numbers) for name, numbers in held_out.ranges.items()} == {
        str(n): c for n, c in enumerate(counts)
    }
    for name, numbers in held_out.ranges.items():
        assert all(held_out.sample(n)[0] == int(name) for n in numbers)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two sources in several shards each; one in twenty documents is long. The second source is a tenth of the text."""
    folder, random = tmp_path_factory.mktemp("held_out"), np.random.default_rng(0)
    for name, count in (("web", 2000), ("code", 200)):
        lengths = np.where(random.random(count) < 0.05, 400, random.integers(5, 30, count))
        rows = [f"{name[0]} " * int(length) + str(n) for n, length in enumerate(lengths)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    Tokenizer.train(["w w c c w c"] * 9, 262).save(folder / "tokenizer.json")
    inputs = (str(folder / "web.jsonl"), str(folder / "code.jsonl"))
    options = PrepareOptions(inputs, None, str(folder / "out"), str(folder / "tokenizer.json"), held_out=0.5)
    prepare(options, workers=1)
    return folder


def data_of(shards, *, seed=1, **settings):
    given = {"source": "indexed", "path": f"{shards}/out", "sequence_length": 256, "cache": f"{shards}/cache"}
    return build(DataSettings(**given, **settings), vocab_size=262, seed=seed)


def documents_a_sequence(data, numbers):
    """Return how many documents end in a sequence, on average: the fewer, the longer they are."""
    ends = [(s.labels[s.weights > 0] == data.tokenizer.end).sum() for s in map(data.held_out.sample, numbers)]
    return float(np.mean(ends))


def test_what_is_evaluated_is_as_long_as_what_is_held_out(shards):
    data, everything = data_of(shards), data_of(shards, held_out_sequences=100_000)
    whole = documents_a_sequence(everything, everything.held_out.ranges["00_web"])
    chosen = documents_a_sequence(data, data.held_out.ranges["00_web"])
    assert chosen == pytest.approx(whole, rel=0.25), (chosen, whole)


def test_every_source_is_evaluated_by_its_share(shards):
    data = data_of(shards)
    web, code = (len(data.held_out.ranges[name]) for name in ("00_web", "01_code"))
    assert web + code == data.held_out.count == 64 and 3 <= code <= 10
    tokenizer = data.tokenizer
    for name, letter in (("00_web", b"w"), ("01_code", b"c")):
        for number in data.held_out.ranges[name]:
            sample = data.held_out.sample(number)
            assert letter in tokenizer.decode_bytes(sample.labels[sample.weights > 0])
            assert (b"c" if letter == b"w" else b"w") not in tokenizer.decode_bytes(sample.labels[sample.weights > 0])
    bytes_of = data.held_out_bytes()
    texts = [data.held_out.sample(n) for n in range(64)]
    assert bytes_of.tolist() == [len(tokenizer.decode_bytes(s.labels[s.weights > 0])) for s in texts]


def test_the_seed_of_a_run_does_not_choose_its_held_out_text(shards):
    one, other = data_of(shards, seed=1), data_of(shards, seed=2)
    for number in range(64):
        assert (one.held_out.sample(number).labels == other.held_out.sample(number).labels).all()
    assert any((one.train.sample(n).labels != other.train.sample(n).labels).any() for n in range(8))


def test_more_sources_than_sequences_are_all_evaluated(shards):
    assert data_of(shards, held_out_sequences=1).held_out.count == 2


def test_the_librarys_text_is_one_source(tmp_path):
    settings = DataSettings(source="stdlib", cache=str(tmp_path), sequence_length=128, held_out_sequences=7)
    data = build(settings, vocab_size=300, seed=1)
    assert {name: len(numbers) for name, numbers in data.held_out.ranges.items()} == {"stdlib": 7}
