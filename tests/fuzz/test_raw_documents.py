"""Inputs of prepare_data: what can be read is read, what cannot is counted, and nothing of either ends the work."""

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from dsv3_megatron.data.raw.documents import Lost, Span, SpanReader
from dsv3_megatron.data.raw.inputs import files_of
from testing.fuzz.mutate import binary, json_lines

ROWS = "".join(json.dumps({"text": f"row {n} " * n, "more": [n, {"a": None}]}) + "\n" for n in range(20)).encode()
ARRAY = json.dumps([{"text": f"row {n}"} for n in range(20)], indent=1).encode()
PACKED = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.ZstdCompressor().compress}


def read_as(path):
    """Return what reads bytes under a name: whole, and in two spans as a large file is read."""

    def read(data):
        path.write_bytes(data)
        (file,) = files_of(path).files
        for spans in ([Span(file)], [Span(file, 0, 300), Span(file, 300)]):
            if file.kind != "rows" and len(spans) > 1:
                continue
            lines = None
            for span in spans:
                reader = SpanReader(span, "text", lines, 5000)
                for found in reader:
                    assert isinstance(found, Lost) or len(found.raw) <= 5000
                    assert not isinstance(found, Lost) or str(found)
                lines = reader.lines

    return read


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_rows(fuzz, tmp_path, name):
    fuzz(json_lines, [ROWS, ARRAY], read_as(tmp_path / name))


@pytest.mark.parametrize("suffix", PACKED)
def test_packed_rows(fuzz, tmp_path, suffix):
    fuzz(binary, [PACKED[suffix](ROWS), PACKED[suffix](ROWS[:900]) * 3], read_as(tmp_path / f"rows.jsonl.{suffix}"))


def test_tables(fuzz, tmp_path):
    path, seeds = tmp_path / "rows.parquet", []
    for options in ({}, {"compression": "zstd", "use_dictionary": False}, {"data_page_version": "2.0"}):
        values = [f"row {n} " * n for n in range(20)] + [None]
        pq.write_table(pa.table({"text": values, "n": range(21)}), path, row_group_size=8, **options)
        seeds.append(path.read_bytes())
    fuzz(binary, seeds, read_as(path))
