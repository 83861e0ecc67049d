"""Files as people have them: what can be read is read, and what cannot costs no more than itself."""

import bz2
import gzip
import json
import lzma
import os

import pytest
import zstandard

from dsv3_megatron.data.raw.documents import Lost, Span, SpanReader
from dsv3_megatron.data.raw.inputs import check_distinct, files_of
from dsv3_megatron.data.raw.json_rows import ValueStream
from launcher import prepare_data, train_tokenizer
from launcher.data_commands.words import path_list
from parallel.errors import DataError, RecipeError

TEXTS = [f"text {n}\nwith 'marks' {{[\\ and w\u00f6rds" for n in range(30)]
ROWS = [json.dumps({"text": text}) for text in TEXTS]


def read(path, field="text"):
    """Return (texts, rows, lost) of an input."""
    found = [row for file in files_of(path).files for row in SpanReader(Span(file), field)]
    good = [row for row in found if not isinstance(row, Lost)]
    return [row.text for row in good], [row.row for row in good], [row for row in found if isinstance(row, Lost)]


LAYOUTS = {
    "lines": "\n".join(ROWS),
    "windows": "\r\n".join(ROWS),
    "old mac": "\r".join(ROWS),
    "array": f"[{', '.join(ROWS)}]",
    "array in lines": "[\n" + ",\n".join(ROWS) + "\n]\n",
    "concatenated": "".join(ROWS),
    "pretty": "\n".join(json.dumps(json.loads(row), indent=2) for row in ROWS),
    "byte order mark": "\ufeff" + "\n".join(ROWS),
    "zeros before": "\0\0\0" + "\n".join(ROWS),
}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.json.gz"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_read_however_they_lie(tmp_path, layout, name):
    data = LAYOUTS[layout].encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert read(tmp_path / name) == (TEXTS, list(range(1, len(TEXTS) + 1)), [])


def test_an_input_that_is_no_file_and_no_folder_is_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in (tmp_path / "pipe.jsonl", "/dev/zero"):
        with pytest.raises(DataError, match="is a pipe, a socket or a device; name a file or a folder"):
            files_of(path)


def test_several_values_on_a_line_share_its_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([ROWS[0], " ".join(ROWS[1:4]), f"[{ROWS[4]}, {ROWS[5]}]", ROWS[6]]))
    assert read(path) == (TEXTS[:7], [1, 2, 2, 2, 3, 3, 4], [])


@pytest.mark.parametrize("layout", ["\n", "", ", "])
def test_one_bad_row_costs_one_row(tmp_path, layout):
    path = tmp_path / "rows.jsonl"
    deep = '{"text":' + "[" * 100_000 + "]" * 100_000 + "}"
    for bad in (deep, '{"text": "x", oops}', '{"txt": "x"}', '{"text": "\\ud800"}'):
        data = layout.join([*ROWS[:5], bad, *ROWS[5:]])
        path.write_text(f"[{data}]" if layout == ", " else data)
        texts, _, lost = read(path)
        assert texts == TEXTS, bad[:30]
        assert [(row.rows, row.line, row.disk) for row in lost] == [(1, 6, 0)]
        assert abs(lost[0].size - len(bad)) <= 3


def test_values_may_be_cut_anywhere():
    text = LAYOUTS["pretty"]
    for size in (1, 7, 50):
        stream, found = ValueStream(), []
        for start in range(0, len(text), size):
            found += stream.feed(text[start : start + size])
        found += stream.feed("", final=True)
        assert [value["text"] for value, _ in found] == TEXTS


PACK = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


@pytest.mark.parametrize("suffix", PACK)
def test_zeros_between_members_and_after_the_last_are_padding(tmp_path, suffix):
    path = tmp_path / f"rows.jsonl.{suffix}"
    halves = ["\n".join(some).encode() + b"\n" for some in (ROWS[:13], ROWS[13:])]
    path.write_bytes(b"".join(PACK[suffix](half) + bytes(2000) for half in halves))
    assert read(path) == (TEXTS, list(range(1, 31)), [])


@pytest.mark.parametrize("suffix", PACK)
def test_a_damaged_member_is_counted_in_bytes_on_disk(tmp_path, suffix):
    path = tmp_path / f"rows.jsonl.{suffix}"
    first, second = (PACK[suffix](("\n".join(some) + "\n").encode()) for some in (ROWS[:13], ROWS[13:]))
    path.write_bytes(first + b"\x07" * 8 + second)
    texts, _, (lost,) = read(path)
    assert texts == TEXTS[:13]
    assert (lost.rows, lost.line, lost.disk) == (0, 14, 8 + len(second)) and "damaged" in str(lost)


def test_one_bad_cell_of_a_table_costs_one_row(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    raw = [text.encode() for text in TEXTS]
    raw[6] = b"\xff\xfe"
    column = pa.array(raw, pa.binary()).view(pa.string())
    pa.parquet.write_table(pa.table({"text": column}), tmp_path / "t.parquet", row_group_size=20)
    texts, numbers, (lost,) = read(tmp_path / "t.parquet")
    assert texts == TEXTS[:6] + TEXTS[7:] and numbers == [n for n in range(1, 31) if n != 7]
    assert (lost.rows, lost.line, lost.size) == (1, 7, 2)


@pytest.mark.parametrize(
    "encoding", ["utf-32-le", "utf-32-be", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
@pytest.mark.parametrize("name", ["rows.jsonl", "page.txt"])
def test_another_encoding_is_named(tmp_path, encoding, name):
    (tmp_path / name).write_bytes("\n".join(ROWS).encode(encoding))
    texts, _, (lost,) = read(tmp_path / name)
    assert not texts and "UTF-" in str(lost) and "convert it to UTF-8" in str(lost) and lost.size + lost.disk


def test_json_of_something_else_is_of_unknown_kind(tmp_path):
    (tmp_path / "package.json").write_text('{"name": "x", "version": "1"}')
    reader = SpanReader(Span(files_of(tmp_path).files[0]), "text")
    assert not list(reader) and reader.foreign


def test_links_of_a_hub_cache_are_followed_once(tmp_path):
    cache = tmp_path / "datasets--a--b"
    (cache / "blobs").mkdir(parents=True)
    for revision in ("r1", "r2"):
        (cache / "snapshots" / revision).mkdir(parents=True)
    (cache / "blobs" / "cafe01").write_text("\n".join(ROWS))
    for revision in ("r1", "r2"):
        (cache / "snapshots" / revision / "rows.jsonl").symlink_to("../../blobs/cafe01")
    (tmp_path / "outside.jsonl").write_text(ROWS[0])
    (cache / "snapshots" / "r1" / "out.jsonl").symlink_to(tmp_path / "outside.jsonl")
    (cache / "snapshots" / "r1" / "gone.jsonl").symlink_to("../../blobs/none")
    (cache / "snapshots" / "r1" / "round").symlink_to(cache)
    for root in (cache, cache / "snapshots", cache / "snapshots" / "r1"):
        found = files_of(root)
        assert read(root)[0] == TEXTS, root
        assert len(found.files) == 1 and not found.ignored
        said = "; ".join(found.skipped)
        assert "a link out of the input" in said and "a link to nothing" in said and "a link to a folder" in said
        assert len(found.skipped) == (3 if root.name == "r1" else 4)


def test_a_file_of_a_hub_cache_in_two_revisions_is_refused(tmp_path, monkeypatch):
    cache = tmp_path / "datasets--a--b"
    (cache / "blobs").mkdir(parents=True)
    for revision, row in (("r1", ROWS[0]), ("r2", ROWS[1])):
        (cache / "snapshots" / revision / "data").mkdir(parents=True)
        (cache / "blobs" / revision).write_text(row)
        (cache / "snapshots" / revision / "data" / "rows.jsonl").symlink_to(f"../../../blobs/{revision}")
    monkeypatch.chdir(cache)
    for root in (tmp_path, cache, "snapshots"):
        with pytest.raises(DataError, match=r"two revisions of data/rows.jsonl, r1 and r2; name one, as input="):
            files_of(root)
    assert read(cache / "snapshots" / "r2")[0] == [TEXTS[1]]


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("a,b", ("a", "b")),
        ("[a, b]", ("a", "b")),
        (r"we\,b.jsonl,c", ("we,b.jsonl", "c")),
        ("'we,b.jsonl',c", ("we,b.jsonl", "c")),
        ('["we,b.jsonl",c]', ("we,b.jsonl", "c")),
        ("it's,b", ("it's", "b")),
    ],
)
def test_a_comma_of_a_name_is_told_from_one_between_names(text, paths, tmp_path, monkeypatch):
    assert path_list(text) == paths
    monkeypatch.chdir(tmp_path)
    (tmp_path / "we,b.jsonl").touch()
    assert path_list("we,b.jsonl") == ("we,b.jsonl",)
    with pytest.raises(RecipeError, match="opens a quote"):
        path_list("'a,b")
    with pytest.raises(RecipeError, match="names no path"):
        path_list(" , ")


def test_an_input_named_twice_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text(ROWS[0])
    for other, says in ((tmp_path / "rows.jsonl", "is named twice"), (tmp_path, "share .*rows.jsonl")):
        inputs = (str(tmp_path / "rows.jsonl"), str(other))
        with pytest.raises(DataError, match=says):
            check_distinct(inputs, [files_of(each) for each in inputs])


def test_a_name_that_is_no_text_is_printed_and_kept(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"caf\xe9.jsonl")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_text("\n".join([*ROWS, "oops"]))
    assert train_tokenizer.main(["input=in", "output=tokenizer.json", "vocab_size=330"]) == 0
    assert prepare_data.main([f"input=in/{name}", "output=out", "tokenizer=tokenizer.json", "workers=1"]) == 0
    told = capfd.readouterr()
    told.out.encode(), told.err.encode()
    assert r"caf\xe9.jsonl:31: is not JSON" in told.err and "left out: 1 not readable (4 B)" in told.out
    assert json.loads((tmp_path / "out/00_caf_xe9/files.jsonl").read_text())["path"] == r"caf\xe9.jsonl"
