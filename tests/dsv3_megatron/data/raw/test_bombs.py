"""Files of a few kilobytes that stand for gigabytes cost a row or a place, and no memory."""

import bz2
import gzip
import json
import lzma
import os
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from dsv3_megatron.data.prepare.shard import PrepareOptions
from dsv3_megatron.data.raw.compressed import chunks
from dsv3_megatron.data.raw.documents import Lost, Span, SpanReader
from dsv3_megatron.data.raw.inputs import files_of
from dsv3_megatron.data.raw.lines import DOCUMENT_BYTES
from dsv3_megatron.data.raw.parquet import ColumnChunk, PagesError, chunks_of, pages_of

MIB = 1 << 20
MOST = 1000
PACKED = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.ZstdCompressor().compress}


def read(path, most=MOST):
    """Return what is read of an input: texts, and what was lost."""
    found = [row for file in files_of(path).files for row in SpanReader(Span(file), "text", most=most)]
    return [row.text for row in found if not isinstance(row, Lost)], [row for row in found if isinstance(row, Lost)]


@pytest.mark.parametrize("suffix", PACKED)
def test_what_is_unpacked_comes_in_small_chunks_and_is_the_same(tmp_path, suffix):
    path, data = tmp_path / f"a.txt.{suffix}", bytes(30 * MIB) + os.urandom(MIB) + bytes(9 * MIB)
    path.write_bytes(PACKED[suffix](data) + PACKED[suffix](b"another member"))
    (file,) = files_of(path).files
    found = list(chunks(file))
    assert b"".join(chunk.data for chunk in found) == data + b"another member"
    assert max(len(chunk.data) for chunk in found) <= 16 * MIB
    assert [chunk.disk for chunk in found] == sorted(chunk.disk for chunk in found)
    assert found[-1].disk == file.size and sum(chunk.member is not None for chunk in found) == 2


@pytest.mark.parametrize("suffix", PACKED)
def test_a_line_that_is_too_long_costs_itself(tmp_path, suffix):
    rows = [json.dumps({"text": text}) for text in ("one", "x" * 40 * MIB, "two", "y" * MOST, "three")]
    path = tmp_path / f"rows.jsonl.{suffix}"
    path.write_bytes(PACKED[suffix]("\n".join(rows).encode()))
    tracemalloc.start()
    texts, lost = read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert texts == ["one", "two", "three"]
    assert [(row.line, row.size) for row in lost] == [(2, len(rows[1])), (4, len(rows[3]))]
    assert str(lost[0]).endswith(f"has {len(rows[1]):,} bytes, more than document_bytes = 1,000; raise that, or leave "
                                 "it out")  # fmt: skip
    assert peak < 30 * MIB, "not even the one line"


def test_the_longest_line_that_is_read_and_spans_that_begin_behind_a_longer_one(tmp_path):
    rows = [json.dumps({"text": "x" * size}) for size in (MOST - 13, MOST - 12, MOST - 11, 5 * MOST, 3)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows))
    texts, lost = read(path)
    assert list(map(len, texts)) == [MOST - 13, MOST - 12, 3] and [row.line for row in lost] == [3, 4]
    (file,) = files_of(path).files
    found, lines = [], None
    for first in range(0, file.size, 700):  # as the pieces of a large file
        reader = SpanReader(Span(file, first, first + 700), "text", lines, MOST)
        found += list(reader)
        lines = reader.lines
    assert [row.line if isinstance(row, Lost) else row.row for row in found] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["rows.json.gz", "text.txt.gz"])
def test_a_value_or_a_text_that_is_too_long_is_not_read(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(('[{"text": "one"},\n{"text": "' + "x" * 40 * MIB).encode()))
    tracemalloc.start()
    texts, lost = read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert texts == (["one"] if "json" in name else []) and len(lost) == 1
    assert "more than document_bytes = 1,000" in str(lost[0]) and peak < 40 * MIB


def test_a_line_of_nothing_but_lists_is_not_made_into_objects(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n' + '{"text": "a", "x": [' + "[]," * 4_000_001 + "1]}\n")
    tracemalloc.start()
    texts, lost = read(path, most=DOCUMENT_BYTES)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert texts == ["one"] and "line 2" not in texts and lost[0].line == 2
    assert "more than 4,000,000 lists" in str(lost[0]) and peak < 100 * MIB


def test_a_stream_that_asks_for_much_memory_is_refused(tmp_path):
    window = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=window).compressobj()  # of no known size
    (tmp_path / "a.txt.zst").write_bytes(stream.compress(b"text" * 100) + stream.flush())
    _, (lost,) = read(tmp_path)
    assert "damaged (" in str(lost) and "memory" in str(lost)


# -- tables ------------------------------------------------------------------------------------------------------------


def table(path, values, kind=None, **options):
    pq.write_table(pa.table({"text": pa.array(values, kind)}), path, **options)
    return path


def test_cells_of_a_table_that_are_too_long_cost_themselves(tmp_path):
    path = table(tmp_path / "a.parquet", ["one", "x" * (MOST + 1), "two"])
    texts, lost = read(path)
    assert texts == ["one", "two"] and [(row.line, row.size) for row in lost] == [(2, MOST + 1)]


@pytest.mark.parametrize("compression", ["zstd", "gzip", "snappy"])
def test_a_page_that_would_take_much_memory_is_not_unpacked(tmp_path, compression):
    path = table(tmp_path / "a.parquet", ["one", "x" * 50 * MIB], compression=compression, use_dictionary=False)
    before = pa.total_allocated_bytes()
    texts, (lost,) = read(path)
    assert texts == [] and lost.rows == 2 and "a page of 52,428," in str(lost)
    assert pa.total_allocated_bytes() - before < MIB


def test_a_dictionary_whose_cells_stand_for_much_is_read_few_rows_at_a_time(tmp_path, monkeypatch):
    values = ["x" * 900] * 3000 + ["y"] * 3
    path = table(tmp_path / "a.parquet", values, compression="zstd")
    asked = []
    original = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda self, rows, **more: asked.append(rows) or original(self, rows, **more)
    )
    texts, lost = read(path)
    assert texts == values and not lost and asked == [4]


def test_a_column_of_lists_is_no_text_whatever_its_rows_stand_for(tmp_path):
    path = table(tmp_path / "a.parquet", [[None] * 3_000_000, []], pa.list_(pa.int8()), compression="zstd")
    assert path.stat().st_size < 10_000
    texts, (lost,) = read(path)
    assert texts == [] and lost.rows == 2 and "field 'text' is list<" in str(lost) and "not text" in str(lost)


def test_the_sizes_of_pages_are_those_that_are_written(tmp_path):
    values = [f"{n} " + "x" * 100 for n in range(5000)]
    for options in ({"use_dictionary": False}, {}, {"data_page_version": "2.0"}, {"write_statistics": True}):
        path = table(tmp_path / "a.parquet", values, compression="none", data_page_size=10_000, **options)
        column = pq.ParquetFile(path).metadata.row_group(0).column(0)
        with path.open("rb") as file:
            (chunk,) = chunks_of(file, "text")
            found = pages_of(file, chunk)
        start = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
        assert chunk == ColumnChunk(start, column.total_compressed_size)
        largest = max(found.data, found.dictionary)
        assert found.data > 0 and largest <= column.total_uncompressed_size
        assert (found.dictionary > 0) == column.has_dictionary_page


def test_headers_of_pages_that_are_damaged_are_said_so(tmp_path):
    path = table(tmp_path / "a.parquet", ["one", "two"])
    with path.open("rb") as file:
        (chunk,) = chunks_of(file, "text")
    data = path.read_bytes()
    for filler in (b"\xff", b"\0", b"\x1c", b"\x19"):
        path.write_bytes(data[:4] + filler * chunk.size + data[4 + chunk.size :])
        with path.open("rb") as file, pytest.raises(PagesError, match="header is damaged"):
            pages_of(file, chunk)
        assert read(path)[1][0].rows == 2


@pytest.mark.parametrize("size", [0, 1, 1 << 31, 1 << 32])
def test_a_footer_that_is_none_is_said_so(tmp_path, size):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1" + b"\x19" * 20 + (size % (1 << 32)).to_bytes(4, "little") + b"PAR1")
    with path.open("rb") as file, pytest.raises(PagesError, match="footer is damaged"):
        chunks_of(file, "text") or pytest.fail("an empty footer has no groups")


def test_another_limit_is_another_folder_and_the_usual_one_that_of_earlier_versions():
    options = PrepareOptions(("a",), None, "out", "tokenizer.json")
    assert "document_bytes" not in options.kept
    other = PrepareOptions(("a",), None, "out", "tokenizer.json", document_bytes=MIB)
    assert other.kept == {**options.kept, "document_bytes": MIB} and "document_bytes=1048576" in other.command
