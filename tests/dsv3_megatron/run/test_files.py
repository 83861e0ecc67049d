"""Files of a run survive kills: a torn last line is left out, a failed write leaves what was there."""

import json

import pytest

from dsv3_megatron.run.directory import RunDirectory
from dsv3_megatron.run.files import read_json, read_json_lines, write_atomically, write_json


@pytest.mark.parametrize("torn", ['{"step": 3, "loss', '{"step": 3}}', "3", "\udcff", ""])
def test_lines_that_are_no_whole_object_are_left_out(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn.encode(errors="surrogateescape"))
    assert [line["step"] for line in read_json_lines(path)] == [1, 2]


def test_a_run_killed_in_the_middle_of_a_line_can_be_read(tmp_path):
    run = RunDirectory(tmp_path)
    run.metrics.write_text('{"step": 1, "tokens": 10}\n{"step": 2, "tok')
    assert run.read_metrics() == [{"step": 1, "tokens": 10}]


def test_a_line_appended_to_a_torn_one_costs_that_line_alone(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"step": 1}\n{"st{"step": 2}\n{"step": 3}\n')
    assert [line["step"] for line in read_json_lines(path)] == [1, 3]


def test_what_is_not_there_is_empty(tmp_path):
    assert read_json_lines(tmp_path / "none") == []
    assert read_json(tmp_path / "none") == {}


@pytest.mark.parametrize("text", ["", "[1]", '{"a": '])
def test_a_json_file_that_is_no_object_is_empty(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    assert read_json(tmp_path / "a.json") == {}


def test_json_survives_the_round_trip(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1, None, "ä"]})
    assert read_json(tmp_path / "a.json") == {"a": [1, None, "ä"]}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomically(path, json.dumps({"step": 1}))

    def refuse(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, json.dumps({"step": 2}))
    assert read_json(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
