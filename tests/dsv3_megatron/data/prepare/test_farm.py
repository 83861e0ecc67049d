"""prepare_data on several nodes: parts joined are what one process makes, copies found across them, one at a time."""

import json
import multiprocessing
import os
import time

import numpy as np
import pytest

from dsv3_megatron.data.prepare.duplicates import mark_duplicates
from dsv3_megatron.data.prepare.encode import HASH
from dsv3_megatron.data.prepare.merge import merge
from dsv3_megatron.data.prepare.output import Output
from dsv3_megatron.data.prepare.shard import PrepareOptions, prepare
from dsv3_megatron.data.source.hashing import hashed
from dsv3_megatron.data.source.origins import document_origin
from dsv3_megatron.data.source.shard_table import open_table, verify_checksums
from dsv3_megatron.data.source.shards import open_shard, read_manifest
from dsv3_megatron.data.tokenizer import Tokenizer
from launcher import data as data_command
from parallel.errors import DataError, UserError

FILES = 6
MEMORY = 1 << 20


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Six files of rows, every seventh of which is a copy of one in another file."""
    folder = tmp_path_factory.mktemp("farm")
    (folder / "in").mkdir()
    for number in range(FILES):
        rows = [f"row {n} of file {number} " * (1 + n % 5) if n % 7 else f"copy {n}" for n in range(70)]
        (folder / "in" / f"{number}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    Tokenizer.train(["row of file copy 0123456789 "] * 9, 264).save(folder / "tokenizer.json")
    return folder


def options_of(place, output, **more):
    given = {"held_out": 0.1, "deduplicate": True, "shard_tokens": 900, **more}
    return PrepareOptions((str(place / "in"),), None, str(output), str(place / "tokenizer.json"), **given)


def documents_of(folder):
    """Return split -> the documents' tokens and names, in order."""
    manifest = read_manifest(folder)
    table, found = open_table(folder, manifest), {"train": [], "held_out": []}
    for number, row in enumerate(table):
        data = open_shard(folder, row)
        for document in range(row.documents):
            origin = document_origin(folder, manifest, table, number, document)
            found[row.split].append((data.get(document).tolist(), origin.file, origin.row))
    return found


def test_parts_joined_are_what_one_process_makes(place, tmp_path):
    whole = prepare(options_of(place, tmp_path / "whole"), workers=1)
    for part in (3, 1, 2):
        prepare(options_of(place, tmp_path / "farm", part=(part, 3)), workers=1)
    joined = merge([str(tmp_path / "farm")], str(tmp_path / "farm"), memory=MEMORY, workers=1)
    assert documents_of(tmp_path / "farm") == documents_of(tmp_path / "whole")
    assert joined.sources == whole.sources and joined.table_sha256 == whole.table_sha256
    (source,) = whole.sources
    assert source.duplicates == 10 * (FILES - 1), "copies are found across files, and across parts"
    verify_checksums(tmp_path / "farm", joined)


def test_a_part_that_is_missing_or_of_another_preparation_is_named(place, tmp_path):
    for part in (1, 3):
        prepare(options_of(place, tmp_path / "farm", part=(part, 3)), workers=1)
    with pytest.raises(DataError, match="part 2 of 3 is missing; prepare it with part=2/3"):
        merge([str(tmp_path / "farm")], str(tmp_path / "out"), memory=MEMORY, workers=1)
    prepare(options_of(place, tmp_path / "other", part=(2, 3), held_out=0.2), workers=1)
    with pytest.raises(DataError, match="is a part of another preparation"):
        merge([str(tmp_path / "farm"), str(tmp_path / "other")], str(tmp_path / "out"), memory=MEMORY, workers=1)


def test_the_command_joins_folders_that_were_prepared_each_by_itself(place, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_bytes((place / "in" / f"{int(name, 16) - 10}.jsonl").read_bytes())
        options = options_of(place, tmp_path / f"{name}_out", deduplicate=False)
        prepare(PrepareOptions(**{**vars(options), "inputs": (str(tmp_path / name / "rows.jsonl"),)}), workers=1)
    words = [f"input={tmp_path}/a_out,{tmp_path}/b_out", f"output={tmp_path}/joined"]
    assert data_command.main(["merge", *words]) == 0
    assert "140 documents of 2 files" in capsys.readouterr().out
    joined, a, b = (documents_of(tmp_path / name) for name in ("joined", "a_out", "b_out"))
    assert {split: [tokens for tokens, *_ in joined[split]] for split in joined} == {
        split: [tokens for tokens, *_ in (*a[split], *b[split])] for split in joined
    }


@pytest.mark.parametrize("memory", [1 << 12, 1 << 30], ids=["many files", "one file"])
def test_copies_are_found_in_bounded_memory_and_the_first_stays(tmp_path, memory):
    random, total = np.random.default_rng(0), 5000
    numbers = random.integers(0, 1500, total)
    hashes = np.zeros(total, dtype=HASH)
    hashes["high"] = hashed(1, numbers)
    hashes["low"] = numbers % 3
    counts = [1200, 0, 3000, 800]
    files = []
    for number, part in enumerate(np.split(hashes, np.cumsum(counts)[:-1])):
        files.append(tmp_path / f"{number}.npy")
        np.save(files[-1], part)
    mark_duplicates(files, counts, memory, tmp_path / "work", tmp_path / "result.npy")
    seen, expected = set(), []
    for number in numbers.tolist():
        expected.append(number in seen)
        seen.add(number)
    assert np.load(tmp_path / "result.npy").tolist() == expected
    assert not any((tmp_path / "work").iterdir())


def hold(folder, ready):
    with Output(folder).locked():
        ready.set()
        time.sleep(60)


def test_the_second_of_two_in_one_folder_is_refused_by_name_and_a_dead_one_does_not_count(place, tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=hold, args=(str(tmp_path / "out"), ready))
    holder.start()
    try:
        assert ready.wait(60)
        with pytest.raises(UserError, match=f"is in use by .*{holder.pid}") as refused:
            prepare(options_of(place, tmp_path / "out"), workers=1)
        assert "\n" not in str(refused.value)
    finally:
        holder.kill()
        holder.join()
    assert prepare(options_of(place, tmp_path / "out"), workers=1).sources[0].documents > 300


def test_packing_beforehand_in_parts_is_what_a_run_takes(place, tmp_path, capsys):
    prepare(options_of(place, tmp_path / "out"), workers=1)
    words = ["pack", f"data={tmp_path}/out", "sequence_length=64", "workers=1"]
    assert data_command.main([*words, "part=1/2"]) == 0
    assert "the others are not all there yet" in capsys.readouterr().out
    assert data_command.main([*words, "part=2/2"]) == 0
    assert "sequences of 64 tokens in" in capsys.readouterr().out
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "packing").rglob("*") if path.is_file()}
    assert made and not any(os.fspath(path).endswith(".partial") for path in made)
    assert data_command.main(words) == 0, "nothing is left to pack"
    assert all(path.stat().st_mtime_ns == before for path, before in made.items())
