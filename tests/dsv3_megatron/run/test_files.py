"""Files of a run survive kills: a torn last line is left out, a failed write leaves what was there."""

import json
import os

import pytest

import dsv3_megatron.run.files as files
from dsv3_megatron.run.directory import RunDirectory
from dsv3_megatron.run.files import (
    cut_json_lines,
    iterate_json_lines,
    last_json_line,
    read_json,
    read_json_lines,
    write_atomically,
    write_json,
)
from dsv3_megatron.run.handed import open_regular


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


@pytest.fixture
def short_lines(monkeypatch):
    monkeypatch.setattr(files, "LINE_BYTES", 64)
    monkeypatch.setattr(files, "_BLOCK_BYTES", 16)
    monkeypatch.setattr(files, "_SKIPPED_BYTES", 16)


LONG = b'{"step": 2, "x": "' + 1000 * b"a" + b'"}\n'


@pytest.mark.parametrize("bad", [b"null\n", b"\0\0\n", b"\n", b"[1]\n", b"[" * 60 + b"\n", LONG])
def test_lines_that_are_no_object_are_counted_and_cost_nothing_else(tmp_path, short_lines, bad):
    path, lost = tmp_path / "events.jsonl", []
    path.write_bytes(b'{"step": 1}\n' + bad + b'{"step": 3}\n' + bad + b'{"step": 4')
    assert [row["step"] for row in iterate_json_lines(path, lambda: lost.append(1))] == [1, 3]
    assert len(lost) == 2


def test_a_line_too_long_to_be_read_is_passed_over_from_the_end_too(tmp_path, short_lines):
    path = tmp_path / "metrics.jsonl"
    rows = b'{"step": 1}\n{"step": 2}\n'
    for lines in (rows + LONG, rows + 3 * LONG, rows + LONG[:-1], rows + LONG + b"\n\n" + LONG[:-1]):
        path.write_bytes(lines)
        assert last_json_line(path) == {"step": 2}
        cut_json_lines(path, lambda row: row["step"] < 2)
        assert path.read_bytes() == b'{"step": 1}\n'
    path.write_bytes(LONG)
    assert last_json_line(path) is None


def test_millions_of_lines_that_cannot_be_objects_are_not_parsed(tmp_path, monkeypatch):
    parsed = []
    monkeypatch.setattr(files, "parse_json", lambda line: parsed.append(line) or json.loads(line))
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"   0,\n\n" * 1000 + b' \t{"a": 1}\n' + "\ufeff".encode() + b'{"b": 2}\n[{"c": 3}]\n')
    assert files.read_json_lines(path)[0] == {"a": 1} and len(parsed) == 2
    assert files.last_json_line(path) is not None and len(parsed) == 3


@pytest.mark.parametrize("read", [read_json_lines, last_json_line, lambda path: cut_json_lines(path, bool)])
def test_a_pipe_in_the_place_of_a_file_does_not_wait(tmp_path, read):
    os.mkfifo(tmp_path / "events.jsonl")
    with pytest.raises(OSError, match="not a regular file"):
        read(tmp_path / "events.jsonl")


def test_what_is_no_regular_file_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(files.time, "sleep", lambda seconds: pytest.fail("waited"))
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(OSError):
            files.retried(lambda path=path: open_regular(path))


def test_nothing_is_cut_behind_a_link(tmp_path):
    victim, link = tmp_path / "victim", tmp_path / "metrics.jsonl"
    victim.write_text("somebody's\n")
    link.symlink_to(victim)
    with pytest.raises(OSError, match="nothing is written through one"):
        cut_json_lines(link, lambda row: False)
    assert victim.read_text() == "somebody's\n"
