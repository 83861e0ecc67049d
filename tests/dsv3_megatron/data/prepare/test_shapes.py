"""Shapes of input that people have: every document is read, or counted as lost in rows and bytes; nothing is silent."""

import bz2
import gzip
import json
import lzma
import os
import shutil
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import zstandard

from dsv3_megatron.data.prepare.farm import encode_all
from dsv3_megatron.data.prepare.shard import PrepareOptions, prepare
from dsv3_megatron.data.source.shard_table import open_table
from dsv3_megatron.data.source.shards import open_shard
from dsv3_megatron.data.tokenizer import Tokenizer
from parallel.errors import DataError

TEXTS = [f"document {n}: " + "word " * (n % 7) + "naïve" for n in range(60)]
ROWS = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in TEXTS]
LINES = b"".join(row + b"\n" for row in ROWS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    Tokenizer.train(TEXTS, 300).save(path)
    return path


def prepared(tmp_path, tokenizer, *inputs, **options):
    inputs = tuple(os.fspath(path) for path in inputs)
    given = PrepareOptions(inputs, options.pop("weights", None), str(tmp_path / "out"), str(tokenizer), **options)
    return prepare(given, workers=1)


def texts_of(tmp_path, manifest, tokenizer):
    engine, found = Tokenizer.load(tokenizer), []
    for row in open_table(tmp_path / "out", manifest):
        data = open_shard(tmp_path / "out", row)
        found += [engine.decode(data.get(n)[:-1]) for n in range(row.documents)]
    return sorted(found)


def nested(depth):
    return b"[" * depth + b",".join(ROWS) + b"]" * depth + b"\n"


HALF = len(ROWS) // 2
SHAPES = {
    "plain.jsonl": LINES,
    "joined.jsonl": b"".join(row + (b"\n" if n % 10 == 9 else b" ") for n, row in enumerate(ROWS)),
    "concatenated.jsonl": b"".join(ROWS),
    "old_mac.jsonl": LINES.replace(b"\n", b"\r"),
    "windows.jsonl": LINES.replace(b"\n", b"\r\n"),
    "marked.jsonl": b"\xef\xbb\xbf" + LINES,
    "arrays_in_an_array.json": b"[[" + b",".join(ROWS[:HALF]) + b"],\n[" + b",".join(ROWS[HALF:]) + b"]]",
    "arrays_in_a_line.jsonl": b'{"text": ""}\n' + nested(2),
    "deep_arrays.jsonl": b'{"text": ""}\n' + nested(700),
    "array.jsonl": b"[" + b",\n".join(ROWS) + b"]",
    "array.json": json.dumps([json.loads(row) for row in ROWS], indent=1).encode(),
    "c4.json.gz": gzip.compress(LINES),
    "dolma.json.zst": zstandard.compress(LINES),
    "rows.jsonl.bz2": bz2.compress(LINES),
    "rows.jsonl.xz": lzma.compress(LINES),
    "members.jsonl.gz": gzip.compress(b"".join(row + b"\n" for row in ROWS[:HALF]))
    + bytes(700)
    + gzip.compress(b"".join(row + b"\n" for row in ROWS[HALF:]))
    + bytes(512),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_document_is_read(tmp_path, tokenizer, name):
    (tmp_path / name).write_bytes(SHAPES[name])
    manifest = prepared(tmp_path, tokenizer, tmp_path / name)
    assert texts_of(tmp_path, manifest, tokenizer) == sorted(TEXTS)
    (source,) = manifest.sources
    assert (source.documents, source.bad, source.torn, manifest.bad_examples) == (60, 0, 0, [])
    assert source.shards["held_out"].documents >= 1, "something is held out of a small corpus too"


def test_bytes_that_are_not_utf8_in_another_field_cost_nothing(tmp_path, tokenizer):
    rows = [row.replace(b"{", b'{"author": "Andr\xe9", ') for row in ROWS]
    for name, break_ in (("lines.jsonl", b"\n"), ("joined.jsonl", b" ")):
        (tmp_path / name).write_bytes(break_.join(rows))
    manifest = prepared(tmp_path, tokenizer, tmp_path / "lines.jsonl", tmp_path / "joined.jsonl")
    assert [(source.documents, source.bad) for source in manifest.sources] == [(60, 0)] * 2


def test_a_json_file_whose_field_comes_late_or_is_not_ascii_is_read(tmp_path, tokenizer):
    row = json.dumps({"id": 1, "about": "y" * 1000}).encode() + b"\n"
    (tmp_path / "late.json").write_bytes(row * 600 + LINES)
    manifest = prepared(tmp_path, tokenizer, tmp_path / "late.json")
    (source,) = manifest.sources
    assert (source.documents, source.bad, source.ignored_files) == (60, 600, 0)
    (tmp_path / "cyrillic.json").write_bytes(LINES.replace(b'"text"', '"текст"'.encode()))
    manifest = prepared(tmp_path / "другое", tokenizer, tmp_path / "cyrillic.json", field="текст")
    assert manifest.sources[0].documents == 60


@pytest.mark.parametrize(("suffix", "pack"), [("zst", zstandard.compress), ("bz2", bz2.compress)])
def test_what_a_cut_stream_keeps_to_itself_is_counted_in_bytes(tmp_path, tokenizer, suffix, pack):
    whole, cut = pack(LINES), pack(LINES * 3)
    cut = cut[: len(cut) // 2]  # a block that gives nothing until it is whole
    (tmp_path / f"rows.jsonl.{suffix}").write_bytes(whole + cut)
    manifest = prepared(tmp_path, tokenizer, tmp_path / f"rows.jsonl.{suffix}")
    (source,) = manifest.sources
    assert (source.documents, source.bad, source.torn, source.torn_bytes) == (60, 0, 1, len(cut))
    assert f"has no end; {len(cut):,} bytes on disk from here on" in manifest.bad_examples[0]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("rows.jsonl", gzip.compress(LINES), "is gzip by its content; name it ...gz"),
        ("rows.json", gzip.compress(LINES), "is gzip by its content; name it ...gz"),
        ("text.txt", bz2.compress(LINES), "is bzip2 by its content; name it ...bz2"),
        ("rows.jsonl", zstandard.compress(LINES), "is Zstandard by its content; name it ...zst"),
        ("rows.jsonl.gz", lzma.compress(LINES), "is xz by its content; name it ...xz"),
        ("rows.jsonl.gz", LINES, "is not gzip, as its name says; rename it"),
        ("rows.jsonl", b"PK\3\4" + bytes(40), "is a zip archive by its content; unpack it"),
        ("rows.jsonl", b"PAR1" + bytes(40), "is Parquet by its content; name it ...parquet"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_reported_as_what_it_is(tmp_path, tokenizer, name, content, says):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.jsonl").write_bytes(LINES)
    (tmp_path / "in" / name).write_bytes(content)
    manifest = prepared(tmp_path, tokenizer, tmp_path / "in")
    (source,) = manifest.sources
    assert (source.documents, source.ignored_files) == (60, 0)
    assert manifest.bad_examples == [f"{tmp_path}/in/{name}: {says}"]
    assert source.torn_bytes == len(content) or source.bad_bytes == len(content)


def test_one_bad_row_of_a_table_costs_one_row(tmp_path, tokenizer):
    cells = [text.encode() for text in TEXTS]
    cells[7] = b"\xff\xfe bad"
    column = pa.Array.from_buffers(pa.string(), len(cells), pa.array(cells, pa.binary()).buffers())  # unchecked
    parquet.write_table(pa.table({"text": column}), tmp_path / "t.parquet", row_group_size=20)
    manifest = prepared(tmp_path, tokenizer, tmp_path / "t.parquet")
    (source,) = manifest.sources
    assert (source.documents, source.bad, source.bad_bytes) == (59, 1, len(cells[7]))
    assert manifest.bad_examples == [f"{tmp_path}/t.parquet, row 8: field 'text': byte 0 is not UTF-8"]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
        (b'{"text": "bad \xff"}', "holds bytes that are not UTF-8"),
        (b'{"text": "half \\ud800"}', "surrogate"),
        (b'{"txt": "x"}', "has no field 'text'; it has 'txt'"),
        (b'{"text": 3}', "field 'text' is int, not text"),
        (b'{"text": "cut', "Unterminated"),
    ],
    ids=["deep", "bytes", "surrogate", "field", "number", "cut"],
)
def test_a_bad_line_costs_one_line_and_is_named(tmp_path, tokenizer, row, why):
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([*ROWS[:5], row, *ROWS[5:]]) + b"\n")
    manifest = prepared(tmp_path, tokenizer, tmp_path / "rows.jsonl")
    (source,) = manifest.sources
    assert (source.documents, source.bad) == (60, 1) and source.bad_bytes >= len(row) - 1
    assert manifest.bad_examples[0].startswith(f"{tmp_path}/rows.jsonl:6: ") and why in manifest.bad_examples[0]


def test_what_a_damaged_file_loses_is_counted_in_bytes_on_disk(tmp_path, tokenizer):
    packed = gzip.compress(LINES) + gzip.compress(LINES)
    first = len(gzip.compress(LINES))
    damaged = packed[: first + 40] + b"\0\xff" * 20 + packed[first + 80 :]
    (tmp_path / "rows.jsonl.gz").write_bytes(damaged)
    (source,) = prepared(tmp_path, tokenizer, tmp_path / "rows.jsonl.gz").sources
    assert source.documents >= 60 and source.torn == 1
    assert 0 < source.torn_bytes <= len(damaged) - first


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"other": 1}\n'], ids=["empty", "blank", "no field"])
def test_an_input_without_documents_is_refused_and_leaves_nothing(tmp_path, tokenizer, content):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(DataError, match="holds no readable document") as refused:
        prepared(tmp_path, tokenizer, tmp_path / "rows.jsonl")
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    assert prepared(tmp_path, tokenizer, tmp_path / "rows.jsonl").sources[0].documents == 60


def test_a_weight_for_an_input_that_gave_nothing_is_refused_by_name(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl").write_bytes(b"\n")
    with pytest.raises(DataError, match=r"b\.jsonl has the weight 0\.5 and gave no document"):
        prepared(tmp_path, tokenizer, tmp_path / "a.jsonl", tmp_path / "b.jsonl", weights=(0.5, 0.5))


def test_a_hub_cache_is_followed_through_its_links_each_blob_once(tmp_path, tokenizer):
    cache = tmp_path / "datasets--team--text"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "abc" / "data").mkdir(parents=True)
    (cache / "blobs" / "0123").write_bytes(LINES)
    (cache / "snapshots" / "abc" / "data" / "train.jsonl").symlink_to("../../../blobs/0123")
    (cache / "snapshots" / "abc" / "again.jsonl").symlink_to("../../blobs/0123")
    manifest = prepared(tmp_path, tokenizer, cache)
    assert texts_of(tmp_path, manifest, tokenizer) == sorted(TEXTS)


def test_names_that_are_no_text_and_names_with_commas_are_read(tmp_path, tokenizer):
    folder = tmp_path / "in"
    folder.mkdir()
    with open(os.fsencode(folder) + b"/caf\xe9.jsonl", "wb") as file:
        file.write(LINES)
    (folder / "a,b.jsonl").write_bytes(b'{"txt": 1}\n')
    manifest = prepared(tmp_path, tokenizer, folder)
    assert manifest.sources[0].documents == 60 and "a,b.jsonl:1" in manifest.bad_examples[0]
    manifest.model_dump_json().encode()


def test_what_is_no_file_or_hidden_is_skipped_and_reported(tmp_path, tokenizer):
    folder = tmp_path / "in"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(LINES)
    (folder / "._a.jsonl").write_bytes(b"\0\5\x16\7")
    (folder / ".ipynb_checkpoints" / "a-checkpoint.py").write_text("x = 1")
    os.mkfifo(folder / "b.jsonl")
    os.mkfifo(folder / "pipe")
    manifest = prepared(tmp_path, tokenizer, folder)
    (source,) = manifest.sources
    assert (source.documents, source.skipped, source.ignored_files) == (60, 3, 1)
    assert sorted(manifest.bad_examples) == [
        "._a.jsonl: a hidden file",
        ".ipynb_checkpoints: a hidden folder",
        "b.jsonl: not a file, but a pipe, a socket or a device",
    ]


def test_what_may_not_be_read_is_refused_before_work_begins(tokenizer):
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, whose parents are closed to others
        os.chmod(shutil.copy(tokenizer, folder), 0o644)  # whatever the umask is
        os.chmod(folder, 0o777)
        root = os.geteuid() == 0
        if root:  # which may read everything: become somebody else
            os.seteuid(65534)
        try:
            if not os.access(folder, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
                pytest.skip(f"{folder} is closed to other users")
            check_what_may_not_be_read(Path(folder), Path(folder) / tokenizer.name)
        finally:
            if root:
                os.seteuid(0)


def check_what_may_not_be_read(tmp_path, tokenizer):
    folder = tmp_path / "in"
    (folder / "locked").mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(LINES)
    (folder / "locked" / "c.jsonl").write_bytes(LINES)
    (folder / "locked").chmod(0)
    for given in (folder, folder / "locked" / "c.jsonl"):
        with pytest.raises(DataError, match=r"input = .*locked.* may not be read \(Permission denied\)"):
            prepared(tmp_path, tokenizer, given)
    (folder / "locked").chmod(0o700)
    (folder / "locked" / "c.jsonl").chmod(0)
    with pytest.raises(DataError, match=r"c.jsonl may not be read \(Permission denied\); change its permissions"):
        prepared(tmp_path, tokenizer, folder)
    (tmp_path / "out").mkdir(mode=0)
    with pytest.raises(DataError, match="output = .*out may not be read"):
        prepared(tmp_path, tokenizer, folder / "a.jsonl")
    (tmp_path / "out").chmod(0o700)


def test_an_output_inside_an_input_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    with pytest.raises(DataError, match=r"output = .*/out is inside input = .*; name a folder outside of it"):
        prepared(tmp_path, tokenizer, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["gone", "replaced", "longer", "cut"])
def test_an_input_that_changes_while_it_is_read_is_an_error(tmp_path, tokenizer, change, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES)

    def changed(*arguments, **keys):
        if change == "gone":
            path.unlink()
        else:
            path.write_bytes({"replaced": LINES[::-1], "longer": LINES * 2, "cut": LINES[:-700]}[change])
        return encode_all(*arguments, **keys)

    monkeypatch.setattr("dsv3_megatron.data.prepare.shard.encode_all", changed)
    with pytest.raises(DataError, match=r"rows.jsonl (is gone|has changed) .*while it was read.*into another folder"):
        prepared(tmp_path, tokenizer, path)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_an_input_that_changes_after_its_task_is_an_error(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES)

    def changed(*arguments, **keys):
        encode_all(*arguments, **keys)
        path.write_bytes(LINES * 2)

    monkeypatch.setattr("dsv3_megatron.data.prepare.shard.encode_all", changed)
    with pytest.raises(DataError, match=r"rows.jsonl has changed while it was read"):
        prepared(tmp_path, tokenizer, path)
