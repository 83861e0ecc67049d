"""prepare_data over nodes and processes: parts, merging, copies on disk, something always held out, one at a time."""

import gzip
import hashlib
import json
import os
import random
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.data.checked.whole import verify_checksums
from dsv3_megatron.data.prepare.duplicates import mark_duplicates
from dsv3_megatron.data.prepare.encode import HASH
from dsv3_megatron.data.prepare.merge import merge
from dsv3_megatron.data.prepare.plan import share_of, units_of
from dsv3_megatron.data.prepare.shard import PrepareOptions, prepare
from dsv3_megatron.data.raw import compressed
from dsv3_megatron.data.raw.documents import Lost, Span, SpanReader
from dsv3_megatron.data.raw.inputs import files_of
from dsv3_megatron.data.raw.lines import Lines
from dsv3_megatron.data.source.origins import document_origin
from dsv3_megatron.data.source.shard_table import open_table
from dsv3_megatron.data.source.shards import open_shard, read_manifest
from dsv3_megatron.data.tokenizer import Tokenizer
from dsv3_megatron.run.exclusive import me
from parallel.errors import DataError, RunInUseError
from testing.lanes import examples


def document(number):
    chance = random.Random(number)
    return " ".join(chance.choice(["the", "fox", "f(x):\n", "wörld"]) for _ in range(chance.randrange(3, 40))) + str(
        number
    )


def rows(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    Tokenizer.train([document(n) for n in range(100)], 400).save(path)
    return path


@pytest.fixture
def inputs(tmp_path):
    """Two sources: lines in several pieces and small texts; a compressed file. Copies lie across them."""
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "rows.jsonl").write_bytes(rows(document(n % 150) for n in range(200)))
    for number in range(12):
        (tmp_path / "web" / f"{number:02d}.txt").write_text(document(140 + number))
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(rows(document(n) for n in range(120, 260))))
    return tmp_path / "web", tmp_path / "packed.jsonl.gz"


def options(inputs, output, tokenizer, **more):
    base = {"weights": None, "held_out": 0.1, "split_share": 0.0, "shard_tokens": 500}
    return PrepareOptions(tuple(map(str, inputs)), output=str(output), tokenizer=str(tokenizer), **{**base, **more})


def named_documents(folder, tokenizer):
    """Return (split, source, file, row) -> text of all documents of a folder."""
    engine, manifest = Tokenizer.load(tokenizer), read_manifest(folder)
    table, found = open_table(folder, manifest), {}
    for number, shard in enumerate(table):
        data = open_shard(folder, shard)
        for each in range(len(data)):
            origin = document_origin(folder, manifest, table, number, each)
            found[shard.split, origin.source, origin.file, origin.row] = engine.decode(data.get(each))
    return found


def test_an_origin_names_the_file_and_row_of_every_document(tmp_path, inputs, tokenizer):
    manifest = prepare(options(inputs, tmp_path / "out", tokenizer), workers=1)
    found = named_documents(tmp_path / "out", tokenizer)
    assert len(found) == sum(source.documents for source in manifest.sources) == 352
    for (_, source, file, row), text in found.items():
        path = inputs[0] / file if source == "00_web" else inputs[1]
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        assert text == (json.loads(raw.splitlines()[row - 1])["text"] if row else raw.decode())


@pytest.mark.parametrize("deduplicate", [False, True])
def test_parts_become_what_one_process_makes(tmp_path, inputs, tokenizer, deduplicate):
    more = {"deduplicate": deduplicate, "deduplicate_memory": 5000}  # several files of hashes
    whole = prepare(options(inputs, tmp_path / "whole", tokenizer, **more), workers=1)
    documents = [source.documents for source in whole.sources]
    assert documents == ([152, 108] if deduplicate else [212, 140])
    for part in (3, 1, 2):
        made = prepare(options(inputs, tmp_path / "farm", tokenizer, part=(part, 3), **more), workers=1)
        assert made.part == part and sum(source.documents for source in made.counted) > 0
    merged = merge([str(tmp_path / "farm")], str(tmp_path / "farm"), memory=5000, workers=1)
    assert merged.sources == whole.sources and merged.table_sha256 == whole.table_sha256
    verify_checksums(tmp_path / "farm", merged)
    assert named_documents(tmp_path / "farm", tokenizer) == named_documents(tmp_path / "whole", tokenizer)
    texts = list(named_documents(tmp_path / "whole", tokenizer).values())
    assert (len(set(texts)) == len(texts)) is deduplicate


def test_a_part_that_is_missing_twice_or_of_another_whole_is_refused(tmp_path, inputs, tokenizer):
    def part(number, output, **more):
        prepare(options(inputs, tmp_path / output, tokenizer, part=(number, 2), **more), workers=1)
        return str(tmp_path / output / "parts" / f"{number:03d}_of_002")

    def refused(says, *folders):
        with pytest.raises(DataError, match=says):
            merge(folders, str(tmp_path / "joined"), memory=1 << 20, workers=1)

    one, copy, other = part(1, "a"), part(1, "b"), part(2, "c", held_out=0.2)
    refused("part 2 of 2 is missing; prepare it with part=2/2", one)
    refused("part 1 of 2 is named twice", one, copy)
    refused("part of another preparation", one, other)
    refused("is named twice; leave one out", one, one)
    refused("no folder that launcher/prepare_data.py wrote", str(tmp_path))


def test_an_unfinished_folder_says_what_it_is(tmp_path, inputs, tokenizer):
    out = tmp_path / "out"

    def reads(folder, says):
        with pytest.raises(DataError, match=says):
            read_manifest(folder)

    made = prepare(options(inputs, out, tokenizer, part=(2, 3)), workers=1)
    assert made.part == 2
    merging = rf"python launcher/data.py merge input={out} output={out}$"
    reads(out / "parts/002_of_003", rf"002_of_003 is part 2 of 3, to be merged with the others: {merging}")
    reads(out, rf"out has 1 of 3 parts finished; prepare part 1, 3 too \(part=1/3\), then merge them: {merging}")
    for number in (1, 3):
        prepare(options(inputs, out, tokenizer, part=(number, 3)), workers=1)
    reads(out, rf"out holds 3 parts that are not merged; merge them: {merging}")
    (out / "parts/003_of_003/part.json").unlink()
    reads(out / "parts/003_of_003", r"is not finished; run the same command again: python .* part=3/3$")
    with pytest.raises(DataError, match=r"input = .*003_of_003 was begun and is not finished; run the same command"):
        merge([str(out)], str(out), memory=1 << 20, workers=1)
    (tmp_path / "begun/.prepare").mkdir(parents=True)  # by a version that kept no command
    reads(tmp_path / "begun", r"is not finished; run the same command again: launcher/prepare_data.py$")
    (tmp_path / "other").mkdir()
    reads(tmp_path / "other", r"other holds no manifest.json; name a folder that launcher/prepare_data.py wrote")


def test_a_part_that_was_copied_without_its_tasks_is_refused(tmp_path, inputs, tokenizer):
    for number in (1, 2):
        prepare(options(inputs, tmp_path / "out", tokenizer, part=(number, 2)), workers=1)
    work = tmp_path / "out/parts/002_of_002/.prepare"
    journal = (work / "tasks.jsonl").read_text().splitlines(keepends=True)
    for kept, says in ((journal[:-1], r"002_of_002 has \d+ of its \d+ documents"), ([], r"has 0 of its \d+ documents")):
        (work / "tasks.jsonl").write_text("".join(kept))
        with pytest.raises(DataError, match=says):
            merge([str(tmp_path / "out")], str(tmp_path / "joined"), memory=1 << 20, workers=1)
    (work / "tasks.jsonl").write_text("".join(journal))
    shard = next(work.rglob("*.bin"))
    shard.rename(tmp_path / "away")
    with pytest.raises(DataError, match=rf"{shard} cannot be read .*; restore it, or prepare its folder again"):
        merge([str(tmp_path / "out")], str(tmp_path / "joined"), memory=1 << 20, workers=1)
    (tmp_path / "away").rename(shard)
    assert merge([str(tmp_path / "out")], str(tmp_path / "joined"), memory=1 << 20, workers=1).sources


def test_what_is_merged_is_not_written_over(tmp_path, inputs, tokenizer):
    def refused(says, *folders, output):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(DataError, match=says):
            merge([str(tmp_path / folder) for folder in folders], str(tmp_path / output), memory=1 << 20, workers=1)
        assert sorted(tmp_path.rglob("*")) == before

    for number in (1, 2):
        prepare(options(inputs, tmp_path / "farm", tokenizer, part=(number, 2)), workers=1)
    parts = ["farm/parts/001_of_002", "farm/parts/002_of_002"]
    refused("is a part of a preparation; name another folder", *parts, output=parts[0])
    for output, some in (("a", inputs[:1]), ("b", inputs[1:])):
        prepare(options(some, tmp_path / output, tokenizer), workers=1)
    refused("is one of the inputs, and finished; name another folder", "a", "b", output="a")
    refused("is finished already, of something else; name another folder", *parts, output="a")
    first = merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "ab"), memory=1 << 20, workers=1)
    again = merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "ab"), memory=1 << 20, workers=1)
    assert first == again, "done is done"
    refused("is finished already, of something else", "b", "a", output="ab")


def test_folders_are_joined_by_source(tmp_path, inputs, tokenizer):
    for output, some in (("a", inputs[:1]), ("b", inputs[1:]), ("c", inputs[:1])):
        prepare(options(some, tmp_path / output, tokenizer), workers=1)
    before = {name: named_documents(tmp_path / name, tokenizer) for name in "abc"}
    joined = merge([str(tmp_path / name) for name in "abc"], str(tmp_path / "out"), memory=1 << 20, workers=1)
    assert [source.name for source in joined.sources] == ["00_web", "00_packed"]
    assert [source.documents for source in joined.sources] == [424, 140]
    verify_checksums(tmp_path / "out", joined)
    assert named_documents(tmp_path / "out", tokenizer) == before["a"] | before["b"]
    files = (tmp_path / "out" / "00_web" / "files.jsonl").read_text().splitlines()
    assert len(files) == 2 * 13
    assert before == {name: named_documents(tmp_path / name, tokenizer) for name in "abc"}, "what is joined stays"
    prepare(options(inputs[:1], tmp_path / "d", tokenizer, held_out=0.3), workers=1)
    with pytest.raises(DataError, match=r"was prepared with held_out=0.3, .*held_out=0.1"):
        merge([str(tmp_path / "a"), str(tmp_path / "d")], str(tmp_path / "no"), memory=1 << 20, workers=1)


@settings(deadline=None, max_examples=examples(60))
@given(st.lists(st.lists(st.integers(0, 12), max_size=9), max_size=6), st.integers(96, 2000))
def test_every_copy_but_the_first_is_marked_whatever_the_memory(tmp_path_factory, files, memory):
    folder = tmp_path_factory.mktemp("hashes")
    paths = []
    for number, values in enumerate(files):
        hashes = np.zeros(len(values), dtype=HASH)
        hashes["high"], hashes["low"] = np.asarray(values, np.uint64) << np.uint64(60), np.asarray(values, np.uint64)
        paths.append(folder / f"{number}.npy")
        np.save(paths[-1], hashes)
    mark_duplicates(paths, list(map(len, files)), memory, folder / "work", folder / "marked.npy")
    every = [value for values in files for value in values]
    assert np.load(folder / "marked.npy").tolist() == [value in every[:n] for n, value in enumerate(every)]


@pytest.mark.parametrize("copies", [1, 2])
def test_a_small_corpus_keeps_one_document_back_with_its_copies(tmp_path, tokenizer, copies):
    texts = [document(n) for n in range(40)] * copies
    (tmp_path / "rows.jsonl").write_bytes(rows(texts))
    found = {}
    for name, more in {"one": {}, "pieces": {"shard_tokens": 100}}.items():
        made = prepare(options([tmp_path / "rows.jsonl"], tmp_path / name, tokenizer, held_out=1e-9, **more), workers=1)
        assert made.sources[0].shards["held_out"].documents == copies
        assert made.sources[0].shards["train"].documents == 39 * copies
        documents = named_documents(tmp_path / name, tokenizer)
        assert sorted(documents.values()) == sorted(texts)
        found[name] = {place for place in documents if place[0] == "held_out"}
        verify_checksums(tmp_path / name, made)
    assert found["one"] == found["pieces"]


@pytest.mark.parametrize(("texts", "held_out"), [(["only"], 0.1), (["same", "same"], 0.1), (["a", "b"], 0.0)])
def test_what_cannot_or_must_not_be_held_out_is_trained_on(tmp_path, tokenizer, texts, held_out):
    (tmp_path / "rows.jsonl").write_bytes(rows(texts))
    made = prepare(options([tmp_path / "rows.jsonl"], tmp_path / "out", tokenizer, held_out=held_out), workers=1)
    assert made.sources[0].shards["held_out"].documents == 0
    assert made.sources[0].shards["train"].documents == len(texts)


def test_no_document_is_an_error_and_leaves_nothing(tmp_path, tokenizer):
    (tmp_path / "rows.jsonl").write_text('{"txt": "x"}\n')
    (tmp_path / "good.jsonl").write_bytes(rows(["x", "y"]))
    with pytest.raises(DataError, match=r"holds no readable document: .*rows.jsonl:1: has no field 'text'"):
        prepare(options([tmp_path / "rows.jsonl"], tmp_path / "out", tokenizer), workers=1)
    assert not (tmp_path / "out").exists()
    both = [tmp_path / "good.jsonl", tmp_path / "rows.jsonl"]
    with pytest.raises(DataError, match=r"rows.jsonl has the weight 0.7 and gave no document"):
        prepare(options(both, tmp_path / "two", tokenizer, weights=(0.3, 0.7)), workers=1)
    assert not (tmp_path / "two" / "manifest.json").exists()


def test_a_folder_in_use_is_refused_by_host_and_process(tmp_path, inputs, tokenizer):
    work = tmp_path / "out" / ".prepare"
    work.mkdir(parents=True)
    (work / "lock").write_text(json.dumps({**me(), "process": os.getppid(), "job": None}))
    with pytest.raises(RunInUseError, match=rf"output = .*out is in use by process {os.getppid()} on {me()['host']}"):
        prepare(options(inputs, tmp_path / "out", tokenizer), workers=1)
    (work / "lock").write_text(json.dumps({**me(), "process": 2**22 + 1, "job": None}))  # no process has that number
    assert prepare(options(inputs, tmp_path / "out", tokenizer), workers=1).sources[0].documents == 212
    assert not work.exists()


@settings(deadline=None, max_examples=examples(60))
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=30), max_size=40), st.integers(1, 400), st.data())
def test_pieces_of_a_file_hold_each_line_once_in_order(tmp_path_factory, texts, size, data):
    path = tmp_path_factory.mktemp("rows") / data.draw(st.sampled_from(["rows.jsonl", "rows.jsonl.gz"]))
    lines = rows(texts)
    members = data.draw(st.sampled_from([1, 3]))
    cuts = [len(lines) * n // members for n in range(members + 1)]
    packed = b"".join(gzip.compress(lines[a:b]) for a, b in pairwise(cuts))
    path.write_bytes(packed if path.suffix == ".gz" else lines)
    file = files_of(path).files[0]
    workers, keeps = data.draw(st.integers(1, 3)), data.draw(st.booleans())
    kept: list[Lines | None] = [None] * workers
    found, piece, ended, place = [], 0, False, Span(file).place
    with mock.patch.object(compressed, "_READ_BYTES", data.draw(st.sampled_from([3, 50, 1 << 18]))):
        while not ended:
            worker = data.draw(st.integers(0, workers - 1))
            reader = SpanReader(Span(file, piece * size, (piece + 1) * size, place), "text", kept[worker])
            found += list(reader)
            if keeps:
                kept[worker] = reader.lines
            piece, ended, place = piece + 1, reader.ended, data.draw(st.sampled_from([place, reader.place]))
    assert not any(isinstance(row, Lost) for row in found)
    assert [(row.text, row.row) for row in found] == [(text, n) for n, text in enumerate(texts, 1)]


@settings(deadline=None, max_examples=examples(60))
@given(st.integers(20, 400), st.integers(1, 100), st.booleans())
def test_a_torn_file_is_reported_by_one_of_its_pieces(tmp_path_factory, size, percent, keeps):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl.gz"
    texts = [f"{n} {hashlib.sha256(b'%d' % n).hexdigest()}" for n in range(40)]
    packed = gzip.compress(rows(texts))
    path.write_bytes(packed[: len(packed) * percent // 101])
    file = files_of(path).files[0]
    found, lines = [], None
    with mock.patch.object(compressed, "_READ_BYTES", 64):
        for piece in range(-(-len(rows(texts)) // size) + 1):
            reader = SpanReader(Span(file, piece * size, (piece + 1) * size), "text", lines)
            found += list(reader)
            lines = reader.lines if keeps else None
    *read, lost = found
    assert isinstance(lost, Lost) and bool(lost.rows) != bool(lost.disk) and lost.line == len(read) + 1
    assert [(row.text, row.row) for row in read] == [(text, n) for n, text in enumerate(texts[: len(read)], 1)]


def test_a_worker_unpacks_a_file_once_however_many_pieces_it_reads(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    content = rows([f"{n} {hashlib.sha256(b'%d' % n).hexdigest()}" for n in range(20_000)])
    path.write_bytes(gzip.compress(content))
    file = files_of(path).files[0]
    unpacked = 0

    def counted(*arguments):
        nonlocal unpacked
        for chunk in compressed.chunks(*arguments):
            unpacked += len(chunk.data)
            yield chunk

    lines, size, documents = None, len(content) // 20, 0
    with mock.patch("dsv3_megatron.data.raw.lines.chunks", counted):
        for piece in range(0, 21, 2):  # every other one: another worker has those between
            reader = SpanReader(Span(file, piece * size, (piece + 1) * size), "text", lines)
            documents += sum(1 for _ in reader)
            lines = reader.lines
    assert documents == pytest.approx(10_000, abs=100)
    assert unpacked <= len(content)


def test_parts_are_runs_of_the_plan_and_all_of_it(inputs):
    units = units_of([files_of(path) for path in inputs], 500)
    pieces = [(unit.source, unit.number, n) for unit in units for n in range(unit.pieces[0], unit.pieces[1] or 1)]
    for parts in (1, 2, 3, 7, 50):
        shares = [share_of(units, part, parts) for part in range(1, parts + 1)]
        dealt = [
            (u.source, u.number, n) for share in shares for u in share for n in range(u.pieces[0], u.pieces[1] or 1)
        ]
        assert dealt == pieces


def test_tasks_that_another_version_has_cut_otherwise_are_not_joined(tmp_path, inputs, tokenizer, monkeypatch):
    given = options(inputs, tmp_path / "out", tokenizer)
    parts = [options(inputs, tmp_path / "parts", tokenizer, part=(n, 2)) for n in (1, 2)]
    with monkeypatch.context() as killed:
        killed.setattr("dsv3_megatron.data.prepare.shard.Finishing.run", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(given, workers=1)
    prepare(parts[0], workers=1)
    monkeypatch.setattr("dsv3_megatron.data.prepare.plan.BYTES_PER_TOKEN", 2)
    with pytest.raises(DataError, match="another command began and did not finish"):
        prepare(given, workers=1)
    prepare(parts[1], workers=1)
    with pytest.raises(DataError, match="part"):
        merge([str(tmp_path / "parts")], tmp_path / "parts", memory=1 << 20, workers=1)
