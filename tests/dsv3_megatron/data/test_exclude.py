"""What is left out of a run, by documents' names and by numbers of samples."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.data.exclude import Exclusion, find_excluded, read_exclusion
from dsv3_megatron.data.source.origins import document_origin
from dsv3_megatron.data.source.samples import numbers_before, sample_numbers
from dsv3_megatron.data.source.shard_table import open_table, write_table
from dsv3_megatron.data.source.shards import Manifest, ShardWriter, Source
from parallel.errors import DataError
from testing.lanes import examples


@st.composite
def ranges(draw):
    """Ranges of samples, ascending and apart."""
    found, at = [], 0
    for _ in range(draw(st.integers(0, 4))):
        first = at + draw(st.integers(0 if not found else 1, 6))
        at = first + draw(st.integers(1, 6))
        found.append((first, at))
    return tuple(found)


@settings(deadline=None, max_examples=examples(500))
@given(ranges(), st.lists(st.integers(1, 7), min_size=1, max_size=8))
def test_steps_take_what_is_left_in_order_and_each_is_known_from_its_end(excluded, batches):
    left = [n for n in range(200) if not any(first <= n < stop for first, stop in excluded)]
    at, taken = 0, []
    for batch in batches:
        numbers, after = sample_numbers(at, batch, excluded)
        assert list(numbers) == left[len(taken) : len(taken) + batch]
        assert after == numbers[-1] + 1
        assert numbers_before(after, batch, excluded) == list(numbers)
        taken += numbers
        at = after


def test_without_exclusions_no_list_is_made():
    assert sample_numbers(7, 10**9) == (range(7, 7 + 10**9), 7 + 10**9)
    assert sample_numbers(50, 3, ((10, 20),)) == (range(50, 53), 53)
    assert numbers_before(3, 5) == [0, 1, 2]


def written(tmp_path, *lines):
    path = tmp_path / "exclude.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.fixture
def folder(tmp_path):
    """Two sources of two shards each; every third row of a file gave no document, every fifth gave two."""
    sources, shards = [], []
    for source in ("a", "b"):
        places = [
            (file, row) for file in range(2) for row in range(1, 13) if row % 3 for _ in range(1 + (row % 5 == 0))
        ]
        for number, some in enumerate((places[:9], places[9:])):
            writer = ShardWriter(tmp_path, f"{source}/train_{number:05d}", 300)
            writer.add([np.asarray([7, 1], np.int32) for _ in some], some)
            shards.append(writer.commit())
        lines = [json.dumps({"path": f"{source}{file}.jsonl", "bytes": 1}) for file in range(2)]
        (tmp_path / source / "files.jsonl").write_text("\n".join(lines) + "\n")
        sources.append(Source(name=source, input=source))
    sources, digest = write_table(tmp_path, sources, shards)
    manifest = Manifest(tokenizer_sha256="", vocab_size=300, options={}, sources=sources, table_sha256=digest)
    return tmp_path, manifest, open_table(tmp_path, manifest)


def test_named_documents_are_found_and_no_other(folder):
    path, manifest, table = folder
    everything = [(s, d) for s in range(len(table)) for d in range(table.row(s).documents)]
    origins = {place: document_origin(path, manifest, table, *place) for place in everything}
    chosen = random.Random(1).sample(sorted(set(origins.values()), key=str), 7)
    lines = [{"source": o.source, "file": o.file, "row": o.row, "step": 9, "sample": 3} for o in chosen]  # as traced
    found = find_excluded(path, manifest, table, read_exclusion(written(path, *lines, "", lines[0])))
    assert {(s, int(d)) for s in range(len(table)) for d in found.documents_of(s)} == {
        place for place, origin in origins.items() if origin in chosen
    }
    assert all((np.diff(found.documents_of(s)) > 0).all() for s in range(len(table)))


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ({"source": "c", "file": "a0.jsonl", "row": 1}, ("line 2: source c is none of", "its sources are: a, b")),
        ({"source": "a", "file": "b0.jsonl", "row": 1}, ("line 2: file b0.jsonl is none of",)),
        ({"source": "a", "file": "a0.jsonl", "row": 3}, ("line 2: row 3 of a0.jsonl gave source a no document",)),
    ],
)
def test_a_name_that_the_folder_does_not_have_is_an_error(folder, line, parts):
    path, *opened = folder
    file = written(path, {"source": "a", "file": "a0.jsonl", "row": 1}, line, {"source": "d", "file": "", "row": 0})
    with pytest.raises(DataError) as caught:
        find_excluded(path, *opened, read_exclusion(file))
    assert all(part in str(caught.value) for part in (f"data.exclude = {file}", *parts))


@pytest.mark.parametrize(
    "line",
    [
        "[1, 2]", "7", '{"source": "a"}', '{"source": "a", "file": "x", "row": -1}', '{"samples": [5, 5]}',
        '{"source": "a", "file": "x", "row": "1"}', '{"source": 1, "file": "x", "row": 1}', '{"samples": [1]}',
        '{"samples": [1, true]}', '{"samples": 5}', '{"source": "a", "file": "x", "row": 1, "samples": [1, 2]}', "{}",
        '{"sample": 3}', '{"samples": [0, 1000000000000000000000000000000]}',
    ],
)  # fmt: skip
def test_a_line_that_names_nothing_is_refused_by_its_number(tmp_path, line):
    with pytest.raises(DataError, match="line 3 names neither a document nor samples") as caught:
        read_exclusion(written(tmp_path, {"samples": [1, 2]}, "", line))
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    path = written(tmp_path, {"samples": [1, 2]})
    plain = read_exclusion(path)
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert read_exclusion(path) == plain


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(DataError, match="no such|No such"):
        read_exclusion(tmp_path / "none")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="it is not UTF-8"):
        read_exclusion(tmp_path / "bytes")
    with pytest.raises(DataError, match="line 1 is not JSON: {samples"):
        read_exclusion(written(tmp_path, "{samples: [1, 2]}"))


def test_an_exclusion_is_known_by_what_it_names(tmp_path):
    lines = [{"samples": [5, 9]}, {"samples": [1, 3]}, {"samples": [2, 4]}, {"source": "a", "file": "x", "row": 1}]
    one = read_exclusion(written(tmp_path, *lines))
    assert one.samples == ((1, 4), (5, 9)) and len(one.documents) == 1
    other = read_exclusion(written(tmp_path, *reversed(lines), lines[-1]))
    assert one.sha256 == other.sha256 and one.text != other.text
    assert one.sha256 != read_exclusion(written(tmp_path, *lines[:3])).sha256
    assert read_exclusion(written(tmp_path, "")).sha256 is None and Exclusion().sha256 is None
    assert str(one) == f"{tmp_path}/exclude.jsonl (sha256 {one.sha256[:8]}): 1 document and 7 samples"
