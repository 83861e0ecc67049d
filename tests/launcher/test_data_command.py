"""data.py COMMAND: the commands over data under one name."""

import json
import os

import pytest

from dsv3_megatron.data.prepare.output import Output
from dsv3_megatron.data.prepare.shard import PrepareOptions, prepare
from dsv3_megatron.data.settings import DataSettings
from dsv3_megatron.data.source import packing_files
from dsv3_megatron.data.source.build import build
from dsv3_megatron.data.tokenizer import Tokenizer
from launcher import data, prepare_data
from launcher.data_commands.trace import json_line
from parallel.errors import DataError, RecipeError, RunInUseError


def test_its_help_names_every_command(capsys):
    assert data.main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"data.py {name} " in told for name in data.COMMANDS)
    assert data.main([]) == 2


@pytest.mark.parametrize("name", data.COMMANDS)
def test_every_command_tells_of_itself(name, capsys):
    assert data.main([name, "--help"]) == 0
    assert "Keys" in capsys.readouterr().out


def test_a_command_that_is_none_is_one_line():
    with pytest.raises(RecipeError, match=r"trase is not a command of data; did you mean trace\? there are: trace"):
        data.main(["trase"])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two files of rows, and a tokenizer."""
    folder = tmp_path_factory.mktemp("commands")
    for number in range(2):
        rows = [f"row {n} of file {number} " * (1 + n % 5) for n in range(70)]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    Tokenizer.train(["row of file 0123456789 "] * 9, 264).save(folder / "tokenizer.json")
    return folder


def prepared(place, output, *numbers):
    inputs = tuple(str(place / f"{number}.jsonl") for number in numbers)
    options = PrepareOptions(inputs, None, str(output), str(place / "tokenizer.json"), held_out=0.1, shard_tokens=900)
    return prepare(options, workers=1)


def test_names_that_are_traced_command_nothing_to_a_terminal():
    found = {"file": "a\x1b[2J\x9b2J\x7f\u2028\n.txt", "text": "w\u00f6rds"}
    line = json_line(found)
    assert line.isprintable() and "w\u00f6rds" in line and json.loads(line) == found


def test_shards_are_checked_and_get_the_checksums_that_they_lack(place, tmp_path, capsys):
    folder = tmp_path / "out"
    shards = sum(totals.shards for totals in prepared(place, folder, 0).sources[0].shards.values())
    assert data.main(["check", f"data={folder}", "workers=1"]) == 0
    assert f"{shards} shards of " in (said := capsys.readouterr().out) and "are as they were written" in said
    assert "checksums of blocks" not in said
    for path in folder.rglob("*.sums"):
        path.unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "has_sums"}))
    settings = DataSettings(source="indexed", path=str(folder), sequence_length=64)
    assert "launcher/data.py check" in build(settings, vocab_size=512, seed=1).notes[-1]
    assert data.main(["check", f"data={folder}", "workers=1"]) == 0
    assert f"were written for {shards} of them" in capsys.readouterr().out
    assert not build(settings, vocab_size=512, seed=1).notes
    assert json.loads((folder / "manifest.json").read_text()) == manifest


def test_folders_that_were_prepared_each_by_itself_are_joined(place, tmp_path, capsys):
    counts = [prepared(place, tmp_path / f"out{number}", number).sources[0].documents for number in range(2)]
    words = [f"input={tmp_path}/out0,{tmp_path}/out1", f"output={tmp_path}/joined"]
    assert data.main(["merge", *words]) == 0
    said = capsys.readouterr().out
    assert counts == [70, 70] and said.count("70 documents of 1 file,") == 2 and "train on it: " in said


def test_packing_beforehand_in_parts_is_what_a_run_takes(place, tmp_path, capsys):
    prepared(place, tmp_path / "out", 0, 1)
    words = ["pack", f"data={tmp_path}/out", "sequence_length=64", "workers=1"]
    assert data.main([*words, "part=1/2"]) == 0
    assert "the others are not all there yet" in capsys.readouterr().out
    assert data.main([*words, "part=2/2"]) == 0
    assert "sequences of 64 tokens in" in capsys.readouterr().out
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "packing").rglob("*") if path.is_file()}
    assert made and not any(os.fspath(path).endswith(".partial") for path in made)
    assert data.main(words) == 0, "nothing is left to pack"
    assert all(path.stat().st_mtime_ns == before for path, before in made.items())


def words_for(place, output, *numbers):
    inputs = ",".join(str(place / f"{number}.jsonl") for number in numbers)
    tokenizer = f"tokenizer={place}/tokenizer.json"
    return [f"input={inputs}", f"output={output}", tokenizer, "held_out=0.1", "shard_tokens=900", "workers=1"]


def packings(folder):
    return {path.relative_to(folder): path.read_bytes() for path in (folder / "packing").rglob("*") if path.is_file()}


def no_more(what):
    def refuse(*_, **__):
        raise AssertionError(f"{what} again")

    return refuse


def test_preparing_and_merging_pack_what_the_command_packs(place, tmp_path, capsys, monkeypatch):
    words = ["sequence_length=64,100", "fim_rate=0.3"]
    assert prepare_data.main([*words_for(place, tmp_path / "apart", 0, 1)]) == 0
    capsys.readouterr()
    assert data.main(["pack", f"data={tmp_path}/apart", *words, "workers=2"]) == 0
    packed = capsys.readouterr().out
    assert prepare_data.main([*words_for(place, tmp_path / "out", 0, 1), *words]) == 0
    assert packed.replace("/apart/", "/out/") in capsys.readouterr().out
    for part in ("1/2", "2/2"):
        assert prepare_data.main([*words_for(place, tmp_path / "farm", 0, 1), f"part={part}"]) == 0
    assert data.main(["merge", f"input={tmp_path}/farm", f"output={tmp_path}/farm", *words, "workers=1"]) == 0
    assert packed.replace("/apart/", "/farm/") in capsys.readouterr().out
    assert packings(tmp_path / "apart") == packings(tmp_path / "out") == packings(tmp_path / "farm") != {}
    monkeypatch.setattr(packing_files, "pack", no_more("packed"))
    for name in ("out", "farm"):
        for length in (64, 100):
            settings = DataSettings(
                source="indexed", path=str(tmp_path / name), sequence_length=length, fim_rate=0.3
            )  # fmt: skip
            assert build(settings, vocab_size=264, seed=1).train.sample(0) is not None


def test_another_length_packs_a_finished_folder_and_prepares_nothing(place, tmp_path, capsys, monkeypatch):
    words = words_for(place, tmp_path / "out", 0)
    assert prepare_data.main(words) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    monkeypatch.setattr("dsv3_megatron.data.prepare.shard.encode_all", no_more("encoded"))
    assert prepare_data.main([*words, "sequence_length=64"]) == 0
    assert "sequences of 64 tokens in" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    assert packings(tmp_path / "out") and not (tmp_path / "out" / ".prepare").exists()
    with Output(tmp_path / "out").locked(), pytest.raises(RunInUseError, match="is in use by process"):
        prepare_data.main([*words, "sequence_length=100"])


def test_the_output_is_locked_while_it_is_packed(place, tmp_path, monkeypatch):
    seen = []
    made = packing_files.PackingFiles.make
    monkeypatch.setattr(
        packing_files.PackingFiles,
        "make",
        lambda self, number: (seen.append((tmp_path / "out/.prepare/lock").exists()), made(self, number)),
    )
    assert prepare_data.main([*words_for(place, tmp_path / "out", 0), "sequence_length=64"]) == 0
    assert seen and all(seen)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sequence_length=0"], "sequence_length = 0: input should be greater than 0"),
        (["sequence_length=64,few"], "sequence_length = few: input should be a valid integer"),
        (["sequence_length=64", "fim_rate=1.5"], "fim_rate = 1.5: input should be less than or equal to 1"),
        (["fim_rate=0.5"], "fim_rate = 0.5 has no effect without sequence_length"),
        (["sequence_length=64", "part=3/16"], "part = 3/16 cannot be packed .*; .* give it to .*data.py merge"),
        (["sequence_length=64", "fim_rate=0.1", "tokenizer=MARKLESS"], "has no fill-in-the-middle tokens"),
    ],
)
def test_what_cannot_be_packed_is_refused_before_anything_is_prepared(place, tmp_path, words, message):
    (tmp_path / "markless").mkdir()
    marks = (place / "tokenizer.json").read_text().replace("fim", "fam")
    (tmp_path / "markless/tokenizer.json").write_text(marks)
    given = words_for(place, tmp_path / "out", 0)
    if "tokenizer=MARKLESS" in words:
        given[2] = f"tokenizer={tmp_path}/markless/tokenizer.json"
    with pytest.raises((RecipeError, DataError), match=message):
        prepare_data.main([*given, *(word for word in words if word != "tokenizer=MARKLESS")])
    assert not (tmp_path / "out").exists()


def test_merging_refuses_a_packing_before_it_begins(place, tmp_path):
    prepared(place, tmp_path / "one", 0)
    with pytest.raises(RecipeError, match="fim_rate = 0.5 has no effect without sequence_length"):
        data.main(["merge", f"input={tmp_path}/one", f"output={tmp_path}/out", "fim_rate=0.5"])
    assert not (tmp_path / "out").exists()
