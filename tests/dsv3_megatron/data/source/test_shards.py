"""A folder of shards: manifest, table, files, and where documents come from."""

import hashlib
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.data.checked.whole import verify_checksums
from dsv3_megatron.data.source.origins import Origin, document_origin, find_document, find_documents
from dsv3_megatron.data.source.shard_table import (
    TABLE,
    check_files,
    check_table,
    open_table,
    write_table,
)
from dsv3_megatron.data.source.shards import (
    MANIFEST,
    ORIGIN,
    Manifest,
    Shard,
    ShardWriter,
    Source,
    Totals,
    open_shard,
    read_manifest,
    token_dtype,
)
from dsv3_megatron.run.files import write_json
from parallel.errors import DataError
from testing.lanes import examples

VOCABULARY = 300


def write_shard(folder, name, documents, origins=None, vocab_size=VOCABULARY):
    writer = ShardWriter(folder, name, vocab_size)
    writer.add([np.asarray(document, dtype=np.int32) for document in documents], origins)
    return writer.commit()


def write_folder(folder, names, shards, vocab_size=VOCABULARY):
    sources, digest = write_table(folder, [Source(name=name, input=f"in/{name}") for name in names], shards)
    manifest = Manifest(
        tokenizer_sha256="0", vocab_size=vocab_size, options={}, sources=sources, table_sha256=digest, has_sums=True
    )  # fmt: skip
    write_json(folder / MANIFEST, manifest.model_dump())
    return manifest


@pytest.fixture
def folder(tmp_path):
    """Two sources, the second in two parts; documents name themselves by their first token."""
    shards = [
        write_shard(tmp_path, "b/train_p002_00000", [[9, 1]], [(5, 1)]),
        write_shard(tmp_path, "a/held_out_00000", [[3, 3, 1]], [(0, 2)]),
        write_shard(tmp_path, "a/train_00001", [[4, 1], [5, 1], [6, 1]], [(0, 4), (0, 4), (2, 0)]),
        write_shard(tmp_path, "b/train_p001_00000", [[8, 1]], [(1, 7)]),
        write_shard(tmp_path, "a/train_00000", [[1, 1], [2, 2, 1]], [(0, 1), (0, 4)]),
    ]
    for source, count in (("a", 3), ("b", 6)):
        lines = [json.dumps({"path": f"{source}/{n}.jsonl", "bytes": 10}) for n in range(count)]
        (tmp_path / source / "files.jsonl").write_text("\n".join(lines) + "\n")
    write_folder(tmp_path, ["a", "b"], shards)
    return tmp_path


def opened(folder):
    manifest = read_manifest(folder)
    return manifest, open_table(folder, manifest)


def test_the_table_is_in_order_and_ranges_follow_from_the_totals(folder):
    manifest, table = opened(folder)
    names = ["a/train_00000", "a/train_00001", "a/held_out_00000", "b/train_p001_00000", "b/train_p002_00000"]
    assert [table.name(n) for n in range(len(table))] == names
    assert [table.range_of(s, split) for s in (0, 1) for split in ("train", "held_out")] == [
        range(0, 2), range(2, 3), range(3, 5), range(5, 5),
    ]  # fmt: skip
    assert manifest.sources[0].shards["train"] == Totals(shards=2, documents=5, tokens=11)
    assert manifest.sources[1].shards["held_out"] == Totals()
    row = table.row(1)
    assert (row.documents, row.tokens, row.first_file, row.first_row, row.part) == (3, 6, 0, 4, 0)
    path = folder / "a/train_00001.bin"
    assert row.bin_bytes == path.stat().st_size and row.bin_sha256 == hashlib.sha256(path.read_bytes()).digest()
    assert len(open_shard(folder, row)) == 3
    check_table(folder, manifest)
    check_files(folder, table)
    verify_checksums(folder, manifest)


def test_a_document_is_found_by_its_origin_and_its_origin_by_its_place(folder):
    manifest, table = opened(folder)
    assert document_origin(folder, manifest, table, 1, 2) == Origin("a", "a/2.jsonl", 0)
    assert document_origin(folder, manifest, table, 4, 0) == Origin("b", "b/5.jsonl", 1)
    for shard in range(len(table)):
        for document in range(table.row(shard).documents):
            origin = document_origin(folder, manifest, table, shard, document)
            found = find_documents(folder, manifest, table, origin.source, origin.file, origin.row)
            assert (shard, document) in found
    line_of_three = find_documents(folder, manifest, table, "a", "a/0.jsonl", 4)
    assert line_of_three == [(0, 1), (1, 0), (1, 1)], "a line that held several documents, across two shards"
    assert find_document(folder, manifest, table, "a", "a/0.jsonl", 4) == (0, 1)
    assert find_document(folder, manifest, table, "a", "a/0.jsonl", 3) is None
    with pytest.raises(DataError, match="file x is none of those that .*files.jsonl lists"):
        find_document(folder, manifest, table, "a", "x", 1)
    with pytest.raises(DataError, match="source c is none of .*; its sources are: a, b"):
        find_document(folder, manifest, table, "c", "x", 1)


@settings(deadline=None, max_examples=examples(30))
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=25), st.integers(1, 5))
def test_every_place_of_the_input_finds_its_documents(tmp_path_factory, places, per_shard):
    folder, places = tmp_path_factory.mktemp("origins"), sorted(places)
    groups = [places[at : at + per_shard] for at in range(0, len(places), per_shard)]
    shards = [
        write_shard(folder, f"s/train_{n:05d}", [[1]] * len(group), group) for n, group in enumerate(groups)
    ]  # fmt: skip
    (folder / "s/files.jsonl").write_text("".join(f'{{"path": "{n}"}}\n' for n in range(4)))
    manifest = write_folder(folder, ["s"], shards)
    table = open_table(folder, manifest)
    for file in range(4):
        for row in range(5):
            expected = [(n // per_shard, n % per_shard) for n, place in enumerate(places) if place == (file, row)]
            assert find_documents(folder, manifest, table, "s", str(file), row) == expected


def test_shards_come_in_any_order_and_give_the_same_table(folder, tmp_path_factory):
    _, table = opened(folder)
    rows = [
        Shard(
            name=row.name,
            documents=row.documents,
            tokens=row.tokens,
            sha256={"bin": row.bin_sha256.hex(), "idx": row.idx_sha256.hex()},
            bytes={"bin": row.bin_bytes, "idx": row.idx_bytes},
            origin_sha256=row.origin_sha256 and row.origin_sha256.hex(),
            first_file=row.first_file,
            first_row=row.first_row,
        )
        for row in table
    ]
    random.Random(1).shuffle(rows)
    other = tmp_path_factory.mktemp("other")
    assert write_table(other, [Source(name=n, input=n) for n in "ab"], rows)[1] == read_manifest(folder).table_sha256
    with pytest.raises(DataError, match="shard c/train_00000 is of none of the sources a, b"):
        write_table(
            other, [Source(name=n, input=n) for n in "ab"], [rows[0].model_copy(update={"name": "c/train_00000"})]
        )


def as_version_1(folder):
    """Rewrite a folder as it was written before there was a table."""
    manifest, table = opened(folder)
    content = manifest.model_dump(exclude={"table_sha256"})
    content["version"] = 1
    for number, source in enumerate(content["sources"]):
        source["shards"] = {
            split: [
                {
                    "name": row.name,
                    "documents": row.documents,
                    "tokens": row.tokens,
                    "sha256": {"bin": row.bin_sha256.hex(), "idx": row.idx_sha256.hex()},
                    "bytes": {"bin": row.bin_bytes, "idx": row.idx_bytes},
                }
                for row in map(table.row, table.range_of(number, split))
            ]
            for split in ("train", "held_out")
        }
    (folder / MANIFEST).write_text(json.dumps(content))
    (folder / TABLE).unlink()


def test_a_folder_of_version_1_is_read_and_has_no_origins(folder):
    before, table = opened(folder)
    as_version_1(folder)
    manifest, old = opened(folder)
    assert manifest.version == 1 and len(manifest.table_sha256) == 64
    assert manifest.sources == before.sources
    names = ("documents", "tokens", "bin_bytes", "idx_bytes", "bin_sha256", "idx_sha256", "part", "number")
    assert all((old.rows[name] == table.rows[name]).all() for name in names)
    check_table(folder, manifest)
    check_files(folder, old)
    verify_checksums(folder, manifest)
    with pytest.raises(DataError, match="does not say where its documents come from"):
        document_origin(folder, manifest, old, 0, 0)


def test_a_file_that_is_missing_or_cut_is_named_by_the_rank_whose_share_it_is(folder):
    _, table = opened(folder)
    path = folder / "a/held_out_00000.idx"
    path.write_bytes(path.read_bytes()[:-1])
    for rank in range(5):
        if rank == 2:
            with pytest.raises(DataError, match=r"held_out_00000.idx has \d+ bytes, the manifest says"):
                check_files(folder, table, (rank, 5))
        else:
            check_files(folder, table, (rank, 5))
    path.unlink()
    with pytest.raises(DataError, match="held_out_00000.idx cannot be read"):
        check_files(folder, table)


def test_a_table_of_another_time_is_refused(folder):
    manifest, _ = opened(folder)
    write_folder(folder, ["a", "b"], [write_shard(folder, "a/train_00000", [[7, 1]])])
    with pytest.raises(DataError, match="has 1 rows .*the manifest says 5 shards"):
        open_table(folder, manifest)
    with pytest.raises(DataError, match="shards.npy has sha256"):
        check_table(folder, manifest)
    (folder / TABLE).write_bytes(b"")
    with pytest.raises(DataError, match="shards.npy cannot be read"):
        opened(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"version": 3}', "has version 3, this code reads 2"),
        ('{"version": 2}', "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
    ],
)
def test_a_manifest_of_another_kind_is_one_line(folder, text, message):
    (folder / MANIFEST).write_text(text)
    with pytest.raises(DataError, match=message):
        read_manifest(folder)


@pytest.mark.parametrize("vocab_size", [2, 65_499, 65_500, 129_280])
def test_ids_lie_as_megatron_core_writes_them(vocab_size):
    from megatron.core.datasets.indexed_dataset import DType

    assert token_dtype(vocab_size) == np.dtype(DType.optimal_dtype(vocab_size)).newbyteorder("<")


@pytest.mark.parametrize("vocab_size", [65_499, 129_280])
def test_a_shard_is_to_the_byte_what_megatron_core_writes(tmp_path, vocab_size):
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    chance = np.random.default_rng(7)
    documents = [chance.integers(0, vocab_size, size=length) for length in (5, 1, 300, 2)]
    documents.append(np.asarray([0, vocab_size - 1]))
    write_shard(tmp_path, "ours", documents, vocab_size=vocab_size)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size))
    for document in documents:
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()


def test_origins_lie_beside_the_shard_one_a_document(folder):
    stored = np.load(folder / "a/train_00001.origin.npy")
    assert stored.dtype == ORIGIN and stored.tolist() == [(0, 4), (0, 4), (2, 0)]
    assert not list(folder.rglob("*.partial*"))
