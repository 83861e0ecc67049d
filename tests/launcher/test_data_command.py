"""data.py COMMAND: the commands over data under one name."""

import json
import os

import pytest

from dsv3_megatron.data.prepare.shard import PrepareOptions, prepare
from dsv3_megatron.data.tokenizer import Tokenizer
from launcher import data
from parallel.errors import RecipeError


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
