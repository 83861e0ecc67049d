"""Reading packed samples from files: what megatron-core reads, few descriptors, and damage told by its name."""

import errno
import json
import os
import resource
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from dsv3_megatron.data.checked.shards import CheckedShards
from dsv3_megatron.data.settings import DataSettings
from dsv3_megatron.data.source import packing_files
from dsv3_megatron.data.source.build import build
from dsv3_megatron.data.source.fim import Middle, restored
from dsv3_megatron.data.source.indexed import PackedShards
from dsv3_megatron.data.source.open_files import OpenFiles
from dsv3_megatron.data.source.packing import PackingRule
from dsv3_megatron.data.source.packing_files import OpenPacking, PackingFiles, choose_place, make_ready, seal
from dsv3_megatron.data.source.shard_folder import ShardFolder
from dsv3_megatron.data.source.shard_table import open_table, write_table
from dsv3_megatron.data.source.shards import Manifest, ShardWriter, Source, open_shard
from dsv3_megatron.data.tokenizer import Tokenizer
from dsv3_megatron.run.files import write_json
from parallel.errors import DataError
from testing.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[4]
START, END, PAD = 0, 1, 2
FIM = Middle(begin=4, hole=3, end=5)


def write_folder(folder, *, shards=7, vocab_size=60_000, documents=40, split="train", has_sums=True):
    """Return the table of ``shards`` shards of one source, and their documents."""
    random, written, found = np.random.default_rng(3), [], []
    for number in range(shards):
        writer = ShardWriter(folder, f"a/{split}_{number:05d}", vocab_size)
        lengths = random.integers(1, 90, documents)
        found.append([np.append(random.integers(6, vocab_size, n), END).astype(np.int32) for n in lengths])
        writer.add(found[-1])
        written.append(writer.commit())
    sources, digest = write_table(folder, [Source(name="a", input="a")], written)
    manifest = Manifest(
        tokenizer_sha256="", vocab_size=vocab_size, options={}, sources=sources, table_sha256=digest, has_sums=has_sums
    )
    return open_table(folder, manifest), found


def write_corpus(folder, splits):
    """Write a folder as prepare_data leaves it, a shard of each of ``splits``."""
    tokenizer = Tokenizer.train(["one two three " * 20], 300)
    tokenizer.save(folder / "tokenizer.json")
    written = []
    for number, split in enumerate(splits):
        writer = ShardWriter(folder, f"a/{split}_{number:05d}", tokenizer.vocab_size)
        writer.add(tokenizer.encode_documents(["one two three " * 5, "three two one"]))
        written.append(writer.commit())
    sources, digest = write_table(folder, [Source(name="a", input="a")], written)
    manifest = Manifest(
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        options={},
        sources=sources,
        table_sha256=digest,
        has_sums=True,
    )
    write_json(folder / "manifest.json", manifest.model_dump())


def files_of(folder, table, *, vocab_size=60_000, place=None, length=64, fim_rate=0.0, split="train"):
    rule = PackingRule(length, fim_rate, FIM if fim_rate else None)
    return PackingFiles(folder, place or folder / "packing", table, "digest", vocab_size, 0, split, rule)


def reader(files, *, opened=None, **more):
    opened = opened or OpenFiles()
    shards = CheckedShards(files.folder, files.table, files.vocab_size, opened)
    common = {"name": "a", "seed": 1, "start_token": START, "pad_token": PAD, "isolate": True}
    return PackedShards([OpenPacking(files, opened)], shards=shards, **{**common, **more})


def ready(files):
    make_ready([files])
    seal([files])
    return files


@pytest.fixture
def folder(tmp_path):
    table, documents = write_folder(tmp_path)
    return tmp_path, table, documents


@pytest.mark.parametrize("vocab_size", [60_000, 129_280])  # two bytes an id, and four
@pytest.mark.parametrize("most", [1, 4096])
def test_every_piece_is_what_megatron_core_reads(tmp_path, vocab_size, most, monkeypatch):
    monkeypatch.setattr(packing_files, "FILES", most)
    table, _ = write_folder(tmp_path, vocab_size=vocab_size)
    files = ready(files_of(tmp_path, table, vocab_size=vocab_size))
    assert len(list(files.index.parent.glob("*.pack"))) == (1 if most == 1 else len(table))
    source = reader(files)
    stored = [open_shard(tmp_path, row) for row in table]
    assert [files.lengths(n).tolist() for n in range(len(table))] == [s.sequence_lengths.tolist() for s in stored]
    covered = [[np.zeros(n, int) for n in s.sequence_lengths] for s in stored]
    for number in range(source.count):
        sample, pieces = source.sample(number), source.pieces(number)
        for order, piece in enumerate(pieces):
            here = slice(piece.at, piece.at + piece.length)
            expected = stored[piece.shard].get(piece.document, offset=piece.offset, length=piece.length)
            assert sample.labels[here].tolist() == expected.tolist()
            assert sample.tokens[piece.at] == (
                stored[piece.shard].get(piece.document, offset=piece.offset - 1, length=1)[0] if piece.offset else START
            )
            assert sample.tokens[here][1:].tolist() == expected[:-1].tolist()
            assert (sample.documents[here] == order).all() and (sample.weights[here] == 1).all()
            covered[piece.shard][piece.document][piece.offset : piece.offset + piece.length] += 1
        filled = pieces[-1].at + pieces[-1].length
        assert (sample.weights[filled:] == 0).all() and (sample.documents[filled:] == len(pieces)).all()
    assert all((places == 1).all() for shard in covered for places in shard)


def test_a_packing_is_one_of_shard_length_and_rearranging_alone(folder, tmp_path_factory):
    """Not of the run's seed, of the other shards, of the name of a source or of the place it lies in."""
    place, table, _ = folder
    alone = tmp_path_factory.mktemp("alone")
    rows = [table.row(n) for n in (4,)]
    (alone / "b").mkdir()
    for suffix in ("bin", "idx"):
        os.link(place / f"{rows[0].name}.{suffix}", alone / f"b/train_00000.{suffix}")
    writer = ShardWriter(alone, "b/train_00009", 60_000)
    shard = writer.commit().model_copy(
        update={
            "name": "b/train_00000",
            "documents": rows[0].documents,
            "tokens": rows[0].tokens,
            "sha256": {"bin": rows[0].bin_sha256.hex(), "idx": rows[0].idx_sha256.hex()},
            "bytes": {"bin": rows[0].bin_bytes, "idx": rows[0].idx_bytes},
        }
    )
    sources, digest = write_table(alone, [Source(name="b", input="b")], [shard])
    other = open_table(
        alone, Manifest(tokenizer_sha256="", vocab_size=60_000, options={}, sources=sources, table_sha256=digest)
    )
    together, single = (
        reader(ready(files_of(where, of, fim_rate=0.5)), shuffle=False)
        for where, of in ((place, table), (alone, other))
    )
    mine = [n for n in range(together.count) if together.pieces(n)[0].shard == 4]
    assert len(mine) == single.count
    assert [together.sample(n).labels.tolist() for n in mine] == [
        single.sample(n).labels.tolist() for n in range(single.count)
    ]


def test_shards_without_a_document_are_stepped_over(tmp_path):
    written = []
    for number, documents in enumerate(([], [[7, END]], [], [[8, 9, END]], [])):
        writer = ShardWriter(tmp_path, f"a/train_{number:05d}", 60_000)
        writer.add([np.asarray(document) for document in documents])
        written.append(writer.commit())
    sources, digest = write_table(tmp_path, [Source(name="a", input="a")], written)
    table = open_table(
        tmp_path, Manifest(tokenizer_sha256="", vocab_size=60_000, options={}, sources=sources, table_sha256=digest)
    )
    source = reader(ready(files_of(tmp_path, table)), shuffle=False)
    assert [[p.shard for p in source.pieces(n)] for n in range(source.count)] == [[1], [3]]
    assert source.sample(1).labels[:3].tolist() == [8, 9, END]


class Left:
    def __init__(self, documents):
        self.documents = documents

    def documents_of(self, shard):
        return np.asarray(self.documents.get(shard, []), dtype=np.int64)


@pytest.mark.parametrize("fim_rate", [0.0, 0.5])
def test_excluded_documents_leave_their_places_empty_and_every_other_token_where_it_was(folder, fim_rate):
    place, table, _ = folder
    files = ready(files_of(place, table, fim_rate=fim_rate))
    out = {1: [0, 7, 39], 5: [3]}
    whole, without = reader(files), reader(files, excluded=Left(out))
    assert whole.count == without.count
    left_out = 0
    for number in range(whole.count):
        full, thinned = whole.sample(number), without.sample(number)
        for piece in without.pieces(number):
            here = slice(piece.at, piece.at + piece.length)
            assert piece.excluded == (piece.document in out.get(piece.shard, []))
            if piece.excluded:
                left_out += piece.length
                assert (thinned.weights[here] == 0).all()
                assert (thinned.tokens[here] == PAD).all() and (thinned.labels[here] == PAD).all()
                full.tokens[here] = full.labels[here] = PAD
                full.weights[here] = 0
        for field in ("tokens", "labels", "weights", "documents"):
            assert (getattr(full, field) == getattr(thinned, field)).all(), field
    lengths = {shard: files.lengths(shard) for shard in out}
    streams = sum(int(lengths[shard][document]) for shard, documents in out.items() for document in documents)
    assert streams <= left_out <= streams + 4 * 3 * bool(fim_rate)


# -- files that are not as they should be ------------------------------------------------------------------------------


def read_all(source):
    return [source.sample(number) for number in range(source.count)]


def test_a_shard_that_ends_early_or_is_gone_is_named(tmp_path):
    table, _ = write_folder(place := tmp_path, has_sums=False)
    source = reader(ready(files_of(place, table)), opened=OpenFiles(2))
    path = place / f"{table.name(3)}.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"train_00003.bin has \d+ bytes, the manifest says"):
        read_all(source)
    path.unlink()
    with pytest.raises(DataError, match=r"train_00003.bin cannot be read \(No such file"):
        read_all(reader(files_of(place, table)))


@pytest.mark.parametrize(("vocab_size", "wrong"), [(60_000, 60_000), (129_280, 129_280), (129_280, -1)])
def test_an_id_that_the_tokenizer_does_not_have_is_never_read(tmp_path, vocab_size, wrong):
    table, _ = write_folder(tmp_path, shards=1, vocab_size=vocab_size, has_sums=False)
    source = reader(ready(files_of(tmp_path, table, vocab_size=vocab_size)))
    path = tmp_path / f"{table.name(0)}.bin"
    stored = np.fromfile(path, dtype="<u2" if vocab_size < 65_500 else "<i4")
    stored[0] = wrong
    stored.tofile(path)
    with pytest.raises(DataError, match=rf"train_00000.bin has token {wrong} in document 0"):
        read_all(source)


def test_a_shard_whose_lengths_are_not_the_tables_is_not_packed(folder):
    place, table, _ = folder
    other = place / "a/train_00001.idx"
    data = bytearray(other.read_bytes())
    data[34] ^= 1  # the first length
    other.write_bytes(data)
    with pytest.raises(DataError, match=r"train_00001.idx does not hold 40 documents of \d+ tokens"):
        make_ready([files_of(place, table)])
    other.write_bytes(b"")
    with pytest.raises(DataError, match="train_00001.idx does not hold"):
        make_ready([files_of(place, table)])
    other.unlink()
    with pytest.raises(DataError, match="train_00001.idx cannot be read"):
        make_ready([files_of(place, table)])


@pytest.mark.parametrize("keep", [0, 9, 30, -1])
def test_a_torn_packing_is_noticed_and_made_anew(folder, keep):
    place, table, _ = folder
    files = ready(files_of(place, table))
    expected = [sample.labels.tolist() for sample in read_all(reader(files))]
    path = files.file(2)
    path.write_bytes(path.read_bytes()[:keep])
    assert files.missing() == [path]
    with pytest.raises(DataError, match="train_00002.pack is damaged: it (ends at byte|has 31 bytes)"):
        read_all(reader(files))
    told = []
    make_ready([files], tell=told.append)
    assert told == [f"packing {path} is damaged; it is made again"]
    assert [sample.labels.tolist() for sample in read_all(reader(files))] == expected


# -- making packings ---------------------------------------------------------------------------------------------------


def test_ranks_make_each_a_share_and_one_seals(folder, monkeypatch):
    place, table, _ = folder
    files, made = files_of(place, table), []
    original = PackingFiles.make
    monkeypatch.setattr(PackingFiles, "make", lambda self, number: (made.append(number), original(self, number)))
    for rank in (0, 1):
        make_ready([files], (rank, 3))
    with pytest.raises(
        DataError, match="2 of 7 packings are missing, such as .*train_00002.pack: .*data.cache must be"
    ):
        seal([files])
    with pytest.raises(DataError, match="train.index is missing on .*data.cache must be a folder that all nodes share"):
        OpenPacking(files, OpenFiles())
    make_ready([files], (2, 3))
    assert sorted(made) == list(range(7)), "each file once"
    seal([files])
    assert reader(files).count > 0
    make_ready([files])
    assert len(made) == 7, "what is there is not made again"


def make_all(arguments):
    files, numbers = arguments
    for number in numbers:
        files.make(number)
    files.seal()
    return files.index.read_bytes()


def test_two_makers_at_once_need_no_lock_and_leave_nothing_behind(folder):
    place, table, _ = folder
    files = files_of(place, table)
    (place / "packing").mkdir()
    (indexes,) = run_ranks(4, make_all, [(files, range(7))])
    assert len(set(indexes)) == 1
    assert sorted(path.name for path in files.index.parent.iterdir()) == sorted(
        [files.index.name, *(files.file(n).name for n in range(7))]
    )
    assert reader(files).sample(0).weights.any()


def test_what_a_killed_maker_left_is_removed_and_modes_follow_the_umask(folder):
    place, table, _ = folder
    files = files_of(place, table)
    before = os.umask(0o027)
    try:
        make_ready([files])
        left = files.file(0).with_name(f"{files.file(0).name}.elsewhere.1.1.partial")
        left.write_bytes(b"x")
        seal([files])
    finally:
        os.umask(before)
    assert not left.exists()
    assert {stat.S_IMODE(path.stat().st_mode) for path in files.index.parent.iterdir()} == {0o640}
    assert stat.S_IMODE(files.index.parent.stat().st_mode) == 0o750


def test_packings_lie_beside_the_shards_or_in_the_cache_where_that_cannot_be(tmp_path, monkeypatch):
    assert choose_place(tmp_path, tmp_path / "cache") == tmp_path / "packing"
    assert list((tmp_path / "packing").iterdir()) == []

    def refuse(*given, **more):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(packing_files, "new_file", refuse)
    assert choose_place(tmp_path, tmp_path / "cache") == tmp_path / "cache" / "packing"


def test_a_full_disk_is_one_line_and_leaves_nothing(folder, monkeypatch):
    place, table, _ = folder

    def refuse(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    files = files_of(place, table)
    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(DataError, match=r"train_00000.pack cannot be written \(No space left on device\)"):
        make_ready([files])
    assert list(files.index.parent.iterdir()) == []


def test_held_out_text_is_packed_as_it_stands(tmp_path):
    table, documents = write_folder(tmp_path, split="held_out")
    files = ready(files_of(tmp_path, table, fim_rate=1.0, split="held_out"))
    plain = ready(files_of(tmp_path, table, split="held_out"))
    assert files.index == plain.index, "one packing for every rate"
    source = reader(files)
    assert not any(piece.rearranged for n in range(source.count) for piece in source.pieces(n))
    assert sum(int(source.sample(n).weights.sum()) for n in range(source.count)) == sum(
        len(each) for shard in documents for each in shard
    )


# -- descriptors -------------------------------------------------------------------------------------------------------


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def test_few_files_are_open_at_once_and_all_can_be_closed(tmp_path):
    for number in range(50):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 10)
    opened, before = OpenFiles(5), descriptors()
    for number in [*range(50), *range(50)]:
        assert opened.read(str(tmp_path / str(number)), 4, 8) == bytes([number]) * 2, "fewer where the file ends"
        assert descriptors() <= before + 5
    assert descriptors() == before + 5
    opened.close()
    assert descriptors() == before


def test_threads_read_at_once_through_few_descriptors(tmp_path):
    for number in range(40):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 1000)
    opened, wrong = OpenFiles(2), []

    def read(seed):
        for number in np.random.default_rng(seed).integers(0, 40, 400).tolist():
            if opened.read(str(tmp_path / str(number)), 100, 7) != bytes([number]) * 100:
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_stale_file_is_opened_anew(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"0123456789")
    opened, real, refused = OpenFiles(2), os.pread, []
    monkeypatch.setattr("dsv3_megatron.run.files.WAITS", (0.0, 0.0))
    opened.read(str(tmp_path / "x"), 1, 0)

    def pread(number, size, place):
        if not refused:
            refused.append(number)
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(number, size, place)

    monkeypatch.setattr("os.pread", pread)
    monkeypatch.setattr("os.open", lambda *given, real=os.open: (refused.append("opened"), real(*given))[1])
    assert opened.read(str(tmp_path / "x"), 3, 2) == b"234"
    assert refused[1:] == ["opened"]


def test_a_limit_of_few_descriptors_lowers_how_many_are_held():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        assert OpenFiles()._most == 16
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert OpenFiles()._most == 64


READ = """
import json, os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from dsv3_megatron.data.settings import DataSettings
from dsv3_megatron.data.source.build import build
data = build(DataSettings(source="indexed", path=sys.argv[1], sequence_length=64), vocab_size=512, seed=1)
for number in range(600):
    data.train.sample(number)
maps = open("/proc/self/maps").read()
print(json.dumps([len(os.listdir("/proc/self/fd")), maps.count(".bin"), maps.count(".idx"), maps.count(".pack")]))
"""


def test_more_shards_than_descriptors_are_read(tmp_path):
    write_corpus(tmp_path, ["held_out"] * 5 + ["train"] * 445)
    found = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    held, *mapped = json.loads(found.stdout)
    assert held < 40 and mapped == [0, 0, 0]


# -- the order ---------------------------------------------------------------------------------------------------------


def test_fill_in_the_middle_can_be_undone_and_is_the_same_for_every_seed(folder):
    place, table, documents = folder
    files = ready(files_of(place, table, fim_rate=0.5, length=128))
    first, second = (reader(files, seed=seed, shuffle=False) for seed in (1, 2))
    streams = []
    for number in range(first.count):
        one, two = first.sample(number), second.sample(number)
        assert one.labels.tolist() == two.labels.tolist()
        streams += [one.labels[p.at : p.at + p.length] for p in first.pieces(number)]
    assert sorted(restored(stream, FIM).tolist() for stream in streams) == sorted(
        document.tolist() for shard in documents for document in shard
    )
    rearranged = sum(int(stream[0]) == FIM.begin for stream in streams)
    assert abs(rearranged / len(streams) - 0.5) < 0.1


# -- a folder that others have packed ----------------------------------------------------------------------------------


def test_packings_that_are_there_are_taken_where_the_folder_cannot_be_written(tmp_path, monkeypatch):
    write_corpus(tmp_path, ["train", "held_out"])
    settings = DataSettings(source="indexed", path=str(tmp_path), sequence_length=64, cache=str(tmp_path / "cache"))
    build(settings, vocab_size=512, seed=1)

    def refuse(*given, **more):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(packing_files, "new_file", refuse)
    monkeypatch.setattr(packing_files, "pack", None)  # nothing is packed again
    assert ShardFolder.of(settings).choose_place() == tmp_path / "packing"
    build(settings, vocab_size=512, seed=1)
    other = settings.model_copy(update={"sequence_length": 32})
    assert ShardFolder.of(other).choose_place() == tmp_path / "cache" / "packing"


def flipped(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("place", [0, 12, 20, 40, 300, 900, -100, -9, -1])
def test_a_flipped_bit_in_a_packing_is_found_at_the_start_and_while_it_is_read(folder, place):
    root, table, _ = folder
    files = ready(files_of(root, table))
    whole = files.file(1).read_bytes()
    flipped(files.file(1), place)
    assert files.missing() == [files.file(1)]
    with pytest.raises(DataError, match="train_00001.pack is damaged: .*; start again, and it is made again"):
        read_all(reader(files))
    told = []
    make_ready([files], tell=told.append)
    assert told == [f"packing {files.file(1)} is damaged; it is made again"] and files.file(1).read_bytes() == whole


@pytest.mark.parametrize("place", [0, 9, 17, 24, 40, -1])
def test_a_damaged_index_of_a_packing_is_found_and_made_again(folder, place):
    root, table, _ = folder
    files = ready(files_of(root, table))
    whole = files.index.read_bytes()
    flipped(files.index, place)
    with pytest.raises(DataError, match="train.index cannot be read .*remove it to have it rebuilt"):
        OpenPacking(files, OpenFiles())
    told = []
    seal([files], told.append)
    assert told == [f"packing {files.index} was damaged; it was made again"] and files.index.read_bytes() == whole


def test_a_damaged_packing_in_a_folder_that_cannot_be_written_is_refused(folder, monkeypatch):
    root, table, _ = folder
    files = ready(files_of(root, table))
    flipped(files.file(1), -1)

    def refuse(path):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(packing_files, "new_file", refuse)
    with pytest.raises(DataError, match=r"train_00001.pack is damaged, and cannot be made again there \(Read-only"):
        make_ready([files])


def test_a_packing_whose_checksums_agree_and_whose_pieces_cannot_be_is_refused(folder, monkeypatch):
    root, table, _ = folder
    original = packing_files.pack
    for field, value in (
        ("length", 1 << 31), ("length", 0), ("offset", 1 << 30), ("document", 40), ("position", 1 << 62),
        ("document_length", 1 << 31),
    ):  # fmt: skip

        def crafted(*given, field=field, value=value):
            packing = original(*given)
            packing.pieces[field] = value
            return packing

        monkeypatch.setattr(packing_files, "pack", crafted)
        source = reader(ready(files_of(root, table, place=root / f"{field}{value}")))
        with pytest.raises(DataError, match=r"\.pack is not of these shards; remove it"):
            source.sample(0)


def test_nothing_is_written_through_a_link_where_a_packing_is_to_be(folder):
    root, table, _ = folder
    victim = root / "victim"
    victim.write_text("kept")
    files = files_of(root, table)
    files.index.parent.mkdir(parents=True)
    for path in (files.file(0), files.index):
        path.symlink_to(victim)
    ready(files)
    assert victim.read_text() == "kept" and not files.index.is_symlink()
    assert reader(files).count > 0
