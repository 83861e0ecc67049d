"""Folders of token shards: manifest, table, lengths, tokens, packings, and where documents come from."""

import json

import numpy as np
import pytest

from dsv3_megatron.data.begun import BEGUN, PART, WORK, unfinished
from dsv3_megatron.data.checked.shards import CheckedShards
from dsv3_megatron.data.exclude import read_exclusion
from dsv3_megatron.data.prepare.output import Output, read_part
from dsv3_megatron.data.source.indexed import PackedShards
from dsv3_megatron.data.source.open_files import OpenFiles
from dsv3_megatron.data.source.origins import _loaded, document_origin, find_documents
from dsv3_megatron.data.source.packing import PackingRule
from dsv3_megatron.data.source.packing_files import OpenPacking, PackingFiles, make_ready, seal
from dsv3_megatron.data.source.shard_table import check_files, open_table, write_table
from dsv3_megatron.data.source.shards import MANIFEST, Manifest, ShardWriter, Source, read_lengths, read_manifest
from dsv3_megatron.data.tasks.read import read_task
from dsv3_megatron.run.files import write_json
from testing.fuzz.mutate import binary, json_lines, json_text

VOCABULARY = 60_000


@pytest.fixture
def folder(tmp_path):
    """Two shards of one source, and the list of its files."""
    written = []
    for number in range(2):
        writer, dice = ShardWriter(tmp_path, f"a/train_{number:05d}", VOCABULARY), np.random.default_rng(number)
        lengths = dice.integers(1, 40, 20)
        writer.add([dice.integers(0, VOCABULARY, n) for n in lengths], [(number, row) for row in range(20)])
        written.append(writer.commit())
    (tmp_path / "a/files.jsonl").write_text('{"path": "0.jsonl", "bytes": 10}\n{"path": "1.jsonl", "bytes": 10}\n')
    sources, digest = write_table(tmp_path, [Source(name="a", input="in/a")], written)
    manifest = Manifest(
        tokenizer_sha256="0", vocab_size=VOCABULARY, options={"held_out": 0.1}, sources=sources, table_sha256=digest,
        has_sums=True,
    )  # fmt: skip
    write_json(tmp_path / MANIFEST, manifest.model_dump())
    return tmp_path


def opened(folder):
    manifest = read_manifest(folder)
    return manifest, open_table(folder, manifest)


def packing_of(folder, table):
    return PackingFiles(folder, folder / "packing", table, "0", VOCABULARY, 0, "train", PackingRule(64))


def samples(folder, table):
    files = OpenFiles()
    packing, shards = OpenPacking(packing_of(folder, table), files), CheckedShards(folder, table, VOCABULARY, files)
    source = PackedShards([packing], name="a", seed=1, start_token=0, pad_token=0, isolate=False, shards=shards)
    return [source.sample(number).labels.tolist() for number in range(source.count)]


def test_a_manifest(fuzz, folder):
    path = folder / MANIFEST

    def read(data):
        path.write_bytes(data)
        manifest, table = opened(folder)
        check_files(folder, table)
        assert [source.shards["train"].shards for source in manifest.sources] == [2]

    fuzz(json_text, [path.read_bytes()], read)


def test_a_table(fuzz, folder):
    path, manifest = folder / "shards.npy", read_manifest(folder)

    def read(data):
        path.write_bytes(data)
        check_files(folder, table := open_table(folder, manifest))
        assert sum(row.tokens for row in table) == manifest.sources[0].shards["train"].tokens

    fuzz(binary, [path.read_bytes()], read)


def test_lengths(fuzz, folder):
    _, table = opened(folder)
    row, path = table.row(0), folder / "a/train_00000.idx"
    expected = read_lengths(folder, row, VOCABULARY, row.idx_sha256).tolist()

    def read(data):
        path.write_bytes(data)
        found = read_lengths(folder, row, VOCABULARY)
        assert int(found.sum()) == row.tokens and int(found.min()) > 0
        assert read_lengths(folder, row, VOCABULARY, row.idx_sha256).tolist() == expected

    fuzz(binary, [path.read_bytes()], read)


@pytest.mark.parametrize("name", ["a/train_00001.bin", "a/train_00001.sums"])
def test_tokens(fuzz, folder, name):
    _, table = opened(folder)
    make_ready([packing_of(folder, table)])
    seal([packing_of(folder, table)])
    expected = samples(folder, table)

    def read(data):
        (folder / name).write_bytes(data)
        assert samples(folder, table) == expected

    fuzz(binary, [(folder / name).read_bytes()], read)


@pytest.mark.parametrize("name", ["train_00001.pack", "train.index"])
def test_a_packing(fuzz, folder, name):
    _, table = opened(folder)
    packing = packing_of(folder, table)
    make_ready([packing])
    seal([packing])
    expected, path = samples(folder, table), packing.index.parent / name

    def read(data):
        path.write_bytes(data)
        make_ready([packing])
        seal([packing])
        assert samples(folder, table) == expected, "what is damaged is made again"
        path.write_bytes(data)
        assert samples(folder, table) == expected

    fuzz(binary, [path.read_bytes()], read)


@pytest.mark.parametrize(("name", "damage"), [("train_00001.origin.npy", binary), ("files.jsonl", json_lines)])
def test_origins(fuzz, folder, name, damage):
    manifest, table = opened(folder)

    def read(data):
        _loaded.cache_clear()
        (folder / "a" / name).unlink()  # what is mapped stays what it is
        (folder / "a" / name).write_bytes(data)
        for document in (0, 19):
            origin = document_origin(folder, manifest, table, 1, document)
            find_documents(folder, manifest, table, origin.source, origin.file, origin.row)

    fuzz(damage, [(folder / "a" / name).read_bytes()], read)


def test_what_is_left_out(fuzz, tmp_path):
    good = b'{"source": "a", "file": "0.jsonl", "row": 3}\n\n{"samples": [5, 9]}\n{"samples": [7, 20]}\n'

    def read(data):
        (tmp_path / "out.jsonl").write_bytes(data)
        assert all(first < stop for first, stop in read_exclusion(tmp_path / "out.jsonl").samples)

    fuzz(json_lines, [good], read)


def test_a_task(fuzz, tmp_path):
    good = b'{"context": "one", "choices": [" two", " three"], "answer": 1, "id": 7}\n' * 3

    def read(data):
        (tmp_path / "task.jsonl").write_bytes(data)
        assert all(each.answer < len(each.choices) for each in read_task(str(tmp_path / "task.jsonl")).examples)

    fuzz(json_lines, [good], read)


def test_a_part_and_its_journal(fuzz, folder):
    manifest, table = opened(folder)
    row, source = table.row(0), manifest.sources[0].model_dump()
    shard = {
        "name": row.name, "documents": row.documents, "tokens": row.tokens, "has_sums": True,
        "sha256": {"bin": row.bin_sha256.hex(), "idx": row.idx_sha256.hex()},
        "bytes": {"bin": row.bin_bytes, "idx": row.idx_bytes},
    }  # fmt: skip
    done = {
        "key": [0, 0, 0], "ended": True, "disk": 5, "place": [0, 0, 0], "counts": {"documents": 20}, "examples": ["x"],
        "shards": {"train": [shard], "held_out": []}, "least": {"hash": "00", "places": [[0, 3]]},
    }  # fmt: skip
    part = {
        "part": 1, "parts": 2, "digest": "0", "tokenizer_sha256": "0", "vocab_size": 300, "options": {"held_out": 0.1},
        "sources": [source], "counted": [source], "bad_examples": [], "skipped": [],
    }  # fmt: skip
    begun = {"fingerprint": "0", "command": "python launcher/prepare_data.py input=a output=b"}
    (folder / WORK).mkdir()
    places = {"key": folder / WORK / "tasks.jsonl", "part": folder / PART, "fingerprint": folder / WORK / BEGUN}
    seeds = [json.dumps(each).encode() for each in (done, part, begun)]

    def read(data):
        for path in places.values():
            path.write_bytes(data)
        unfinished(folder)
        Output(folder).done()
        read_part(folder)

    for kind, good in zip(("key", "part", "fingerprint"), seeds):
        places[kind].write_bytes(good)
    assert Output(folder).done() and read_part(folder)
    fuzz(json_text, seeds[2:], lambda data: (places["fingerprint"].write_bytes(data), unfinished(folder)))
    fuzz(json_lines, seeds[:1], lambda data: (places["key"].write_bytes(data), Output(folder).done()))
    fuzz(json_text, seeds[1:2], lambda data: (places["part"].write_bytes(data), unfinished(folder), read_part(folder)))
