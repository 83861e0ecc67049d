"""Damage to shards is found when they are read, whatever part of them it is in."""

import json
import os

import numpy as np
import pytest

from dsv3_megatron.data.checked.blocks import (
    BLOCK_BYTES,
    BlockSums,
    parse_sums,
    read_checked,
    sums_bytes,
    verify,
)
from dsv3_megatron.data.checked.npy import open_npy
from dsv3_megatron.data.checked.shards import CheckedShards
from dsv3_megatron.data.checked.whole import check_folder, verify_checksums
from dsv3_megatron.data.source.open_files import OpenFiles
from dsv3_megatron.data.source.shard_table import check_files, open_table, write_table
from dsv3_megatron.data.source.shards import MANIFEST, Manifest, ShardWriter, Source, read_lengths, read_manifest
from dsv3_megatron.run.files import write_json
from parallel.errors import DataError

VOCABULARY = 60_000
TOKENS = 3 * BLOCK_BYTES // 2 + 100  # of two bytes: three blocks and a bit


def write_folder(folder, *, has_sums=True, shards=2):
    """Write shards of one source; documents of 50 tokens."""
    written = []
    for number in range(shards):
        writer = ShardWriter(folder, f"a/train_{number:05d}", VOCABULARY)
        tokens = np.random.default_rng(number).integers(0, VOCABULARY, TOKENS)
        writer.add(tokens[at : at + 50] for at in range(0, TOKENS, 50))
        written.append(writer.commit())
        if not has_sums:
            (folder / f"a/train_{number:05d}.sums").unlink()
    sources, digest = write_table(folder, [Source(name="a", input="a")], written)
    manifest = Manifest(
        tokenizer_sha256="", vocab_size=VOCABULARY, options={}, sources=sources, table_sha256=digest, has_sums=has_sums
    )
    write_json(folder / MANIFEST, manifest.model_dump())
    return manifest, open_table(folder, manifest)


def reading(folder, table):
    return CheckedShards(folder, table, VOCABULARY, OpenFiles())


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES + 17])
def test_sums_do_not_depend_on_the_pieces_that_bytes_come_in(tmp_path, size):
    data, sums = np.random.default_rng(size).bytes(size), BlockSums()
    for at in range(0, size, 1000):
        sums.add(data[at : at + 1000])
    whole = BlockSums()
    whole.add(data)
    assert sums.content() == whole.content() and len(sums.content()) == sums_bytes(size)
    path = tmp_path / "file"
    path.write_bytes(data + b"what follows is none of its bytes")
    parsed = parse_sums(sums.content(), size)
    with path.open("rb") as file:
        verify(file, parsed, size)
    places = [(0, size), (size // 2, 5), (max(0, size - 1), 9), (BLOCK_BYTES - 3, 6)]
    found = [read_checked(OpenFiles(), str(path), length, place, parsed, size) for place, length in places]
    assert found == [data[place : place + length] for place, length in places]


@pytest.mark.parametrize("byte", [0, BLOCK_BYTES - 1, BLOCK_BYTES, 2 * TOKENS - 1])
@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_is_found_by_whoever_reads_its_block_and_by_nobody_else(tmp_path, byte, bit):
    _, table = write_folder(tmp_path)
    path = tmp_path / "a/train_00001.bin"
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)
    first = byte // BLOCK_BYTES * BLOCK_BYTES
    stop = min(first + BLOCK_BYTES, len(data))
    read = reading(tmp_path, table)
    with pytest.raises(
        DataError, match=rf"train_00001.bin is damaged: bytes {first:,} to {stop:,} have another"
    ) as met:
        read.tokens(1, first // 2 + 3, 5, 0)
    assert "\n" not in str(met.value)
    assert len(read.tokens(1, 0 if first else BLOCK_BYTES // 2, 5, 0)) == 5
    assert len(read.tokens(0, byte // 2, 1, 0)) == 1


def test_an_id_that_only_the_manifest_has_is_never_read(tmp_path):
    _, table = write_folder(tmp_path)
    few = CheckedShards(tmp_path, table, VOCABULARY, OpenFiles(), ids=300)
    with pytest.raises(
        DataError, match=r"train_00000.bin has token \d+ in document 0, none of the tokenizer's 300 ids"
    ):
        few.tokens(0, 0, 50, 0)


def test_a_shard_of_zeros_is_found(tmp_path):
    _, table = write_folder(tmp_path)
    path = tmp_path / "a/train_00000.bin"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DataError, match="train_00000.bin is damaged: bytes 65,536 to 131,072"):
        reading(tmp_path, table).tokens(0, TOKENS // 2, 4, 7)


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + b"\0", lambda data: b""])
def test_sums_that_are_damaged_are_told_from_a_shard_that_is(tmp_path, damage):
    _, table = write_folder(tmp_path)
    path = tmp_path / "a/train_00000.sums"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"train_00000.sums cannot be read \(it .*launcher/data.py check data="):
        reading(tmp_path, table).tokens(0, 0, 4, 0)
    assert check_folder(tmp_path, 1).added == 1, "the shard is whole, so they can be written again"
    assert len(reading(tmp_path, table).tokens(0, 0, 4, 0)) == 4


def test_a_folder_of_an_earlier_version_is_read_and_gets_its_checksums(tmp_path):
    manifest, table = write_folder(tmp_path, has_sums=False)
    expected = reading(tmp_path, table).tokens(1, 100, 50, 2)
    check_files(tmp_path, table)
    one = check_folder(tmp_path, 1, part=(1, 2))
    assert (one.shards, one.added, one.lacking) == (1, 1, 1) and not read_manifest(tmp_path).has_sums
    two = check_folder(tmp_path, 1, part=(2, 2))
    assert (two.shards, two.added, two.lacking) == (1, 1, 0)
    after = read_manifest(tmp_path)
    assert after == manifest.model_copy(update={"has_sums": True}), "the folder is the same otherwise"
    checked = open_table(tmp_path, after)
    assert checked.has_sums and (reading(tmp_path, checked).tokens(1, 100, 50, 2) == expected).all()
    verify_checksums(tmp_path, after)
    assert check_folder(tmp_path, 1).added == 0
    (tmp_path / "a/train_00001.sums").unlink()
    with pytest.raises(DataError, match="train_00001.sums cannot be read"):
        check_files(tmp_path, checked)


def test_checking_finds_what_no_run_has_read(tmp_path):
    write_folder(tmp_path)
    path = tmp_path / "a/train_00001.bin"
    data = bytearray(path.read_bytes())
    data[77] ^= 4
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"train_00001.bin has sha256 [0-9a-f]{12}.., the table says"):
        check_folder(tmp_path, 1)


# -- files of strangers ------------------------------------------------------------------------------------------------


def test_a_link_out_of_the_folder_is_refused_and_links_in_it_are_followed(tmp_path):
    folder, elsewhere = tmp_path / "shards", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    _, table = write_folder(folder)
    path = folder / "a/train_00000.bin"
    (folder / "kept").mkdir()
    path.rename(folder / "kept/one.bin")
    path.symlink_to("../kept/one.bin")
    check_files(folder, table)
    linked = tmp_path / "linked"
    linked.symlink_to(folder)
    check_files(linked, table)
    (folder / "a").rename(elsewhere / "a")
    (folder / "a").symlink_to(elsewhere / "a")  # a source on another disk
    (elsewhere / "a/train_00000.bin").unlink()
    os.link(folder / "kept/one.bin", elsewhere / "a/train_00000.bin")
    check_files(folder, table)
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(2 * TOKENS))
    (elsewhere / "a/train_00000.bin").unlink()
    (elsewhere / "a/train_00000.bin").symlink_to(secret)
    with pytest.raises(DataError, match="train_00000.bin is refused: .* is a link out of the folder.*make it a hard"):
        check_files(folder, table)
    with pytest.raises(DataError, match="train_00000.bin is refused"):
        reading(folder, table).tokens(0, 0, 4, 0)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    _, table = write_folder(tmp_path)
    path = tmp_path / "a/train_00000.bin"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="train_00000.bin is not a regular file"):
        check_files(tmp_path, table)
    with pytest.raises(DataError, match="train_00000.bin is not a regular file"):
        reading(tmp_path, table).tokens(0, 0, 4, 0)
    with pytest.raises(OSError, match="not a regular file"):
        OpenFiles().read(str(path), 4, 0)


def one_index(folder, lengths):
    writer = ShardWriter(folder, "one", VOCABULARY)
    writer.add(np.zeros(length, dtype=np.int32) for length in lengths)
    return writer.commit(), folder / "one.idx"


@pytest.mark.parametrize(
    "lengths", [[0, 8], [-1, 9], [9, -1], [2**31 - 1, -(2**31) + 9]], ids=["zero", "negative", "last", "wrapping"]
)
def test_lengths_that_no_document_has_are_refused(tmp_path, lengths):
    shard, path = one_index(tmp_path, [3, 5])
    data = bytearray(path.read_bytes())
    data[34:42] = np.asarray(lengths, dtype="<i4").tobytes()
    path.write_bytes(data)
    with pytest.raises(DataError, match="one.idx does not hold 2 documents of 8 tokens"):
        read_lengths(tmp_path, shard, VOCABULARY)


def test_an_index_that_sums_up_to_the_same_is_found_by_its_checksum(tmp_path):
    shard, path = one_index(tmp_path, [3, 5])
    data = bytearray(path.read_bytes())
    data[34:42] = np.asarray([4, 4], dtype="<i4").tobytes()
    path.write_bytes(data)
    with pytest.raises(DataError, match="one.idx has another SHA-256 than the table"):
        read_lengths(tmp_path, shard, VOCABULARY, bytes.fromhex(shard.sha256["idx"]))


def test_a_count_of_documents_is_compared_with_the_file_before_memory_is_asked_for(tmp_path):
    shard, _ = one_index(tmp_path, [3, 5])
    with pytest.raises(DataError, match="does not hold 1152921504606846976 documents"):
        read_lengths(tmp_path, shard.model_copy(update={"documents": 1 << 60}), VOCABULARY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": 1 << 41}, "does not agree"),
        ({"tokens": 5}, "does not agree"),
        ({"bin_bytes": 5}, "does not agree"),
        ({"source": 3}, "has a shard of source 3"),
        ({"split": 2}, "split 2"),
        ({"number": 1}, "row 1 is not in order, or is there twice"),
        ({"split": 1, "number": 7}, "row 1 is not in order"),
    ],
)
def test_a_table_that_says_what_cannot_be_is_refused_though_the_manifest_vouches_for_it(tmp_path, change, message):
    manifest, _ = write_folder(tmp_path)
    rows = np.load(tmp_path / "shards.npy")
    for name, value in change.items():
        rows[name][0] = value
    np.save(tmp_path / "shards.npy", rows)
    with pytest.raises(DataError, match=message):
        open_table(tmp_path, manifest)


@pytest.mark.parametrize(
    "change",
    [
        {"sources": [{"name": "../a", "input": "a"}]},
        {"sources": [{"name": "/etc", "input": "a"}]},
        {"sources": [{"name": "a", "input": "a"}, {"name": "a", "input": "b"}]},
        {"sources": [{"name": "a", "input": "a", "documents": -1}]},
        {"sources": [{"name": "a", "input": "a", "documents": True}]},
        {"sources": [{"name": "a", "input": "a", "weight": float("inf")}]},
        {"sources": "a"},
        {"vocab_size": 0},
        {"vocab_size": 1e99},
        {"table_sha256": 5},
        {"unknown": 1},
    ],
)
def test_a_manifest_is_typed_and_its_names_stay_in_the_folder(tmp_path, change):
    manifest, _ = write_folder(tmp_path, shards=1)
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest.model_dump(), **change}))
    with pytest.raises(DataError, match=f"manifest.json cannot be read .*{next(iter(change))}") as met:
        read_manifest(tmp_path)
    assert "\n" not in str(met.value)


@pytest.mark.parametrize(
    "text", ['{"version": 2, "version": 1}', "[" * 200_000, '{"a": 1' + "0" * 5000 + "}", "\xff", "\0"]
)
def test_a_manifest_that_readers_would_read_differently_or_not_at_all_is_refused(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match="manifest.json cannot be read"):
        read_manifest(tmp_path)


def header(text):
    return b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 an archive",
        b"\x80\x04. a pickle",
        header(b"{'descr': '<i8', 'fortran_order': False, 'shape': (1099511627776,)}"),
        header(b"{'descr': '<i8', 'fortran_order': False, 'shape': (4, 1)}") + bytes(32),
        header(b"{'descr': '<f8', 'fortran_order': False, 'shape': (4,)}") + bytes(32),
        header(b"{'descr': '|O', 'fortran_order': False, 'shape': (4,)}") + bytes(32),
        header(b"{'descr': '<i8', 'fortran_order': True, 'shape': (4,)}") + bytes(32),
        header(b"{'descr': '<i8', 'fortran_order': False, 'shape': (4,)}") + bytes(31),
        header(b"{'descr': '<i8', 'fortran_order': False, 'shape': (4,)}") + bytes(33),
        header(b"(" * 9000),
        b"\x93NUMPY\x09\0" + bytes(40),
    ],
)
def test_an_array_that_is_not_what_its_reader_expects_is_refused(tmp_path, content):
    path = tmp_path / "a.npy"
    path.write_bytes(content)
    for mapped in (False, True):
        with pytest.raises(ValueError, match=r"is no array|holds .*, not a row|rows in") as met:
            open_npy(path, np.dtype("<i8"), 4, mapped=mapped)
        assert "\n" not in str(met.value)


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("mapped", [False, True])
def test_an_array_is_read(tmp_path, rows, mapped):
    np.save(tmp_path / "a.npy", np.arange(rows))
    assert open_npy(tmp_path / "a.npy", np.dtype("<i8"), rows, mapped=mapped).tolist() == list(range(rows))
