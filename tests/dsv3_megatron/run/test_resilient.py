"""What a run writes beside its checkpoints outlives a refusing disk: nothing raises, all is told, lines come later."""

import errno
import json
import os
import resource

import pytest

import dsv3_megatron.run.resilient as resilient
from dsv3_megatron.run.files import cut_json_lines, iterate_json_lines, last_json_line, read_json, read_json_lines
from dsv3_megatron.run.resilient import ResilientFiles


class Told:
    """Takes what is told: names and values apart, texts apart."""

    def __init__(self):
        self.events, self.texts = [], []

    def __call__(self, name, values, text):
        self.events.append((name, values))
        self.texts.append(text)

    @property
    def names(self):
        return [name for name, _ in self.events]


@pytest.fixture
def told():
    return Told()


@pytest.fixture
def files(told, monkeypatch):
    """Files that are tried again at once."""
    monkeypatch.setattr(resilient, "RETRY_SECONDS", 0.0)
    return ResilientFiles(told)


def line(step):
    return json.dumps({"step": step}).encode() + b"\n"


def steps(path):
    return [row["step"] for row in read_json_lines(path)]


def test_lines_that_a_full_disk_refuses_are_written_when_it_takes_them_again(tmp_path, files, told, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(resilient, "appended_file", lambda path: open("/dev/full", "a+b", buffering=0))  # noqa: SIM115
        for step in (1, 2, 3):
            files.append(path, line(step))
    assert told.events == [("write_failed", {"file": str(path), "reason": "No space left on device"})]
    files.append(path, line(4))
    files.append(path, line(5))
    assert steps(path) == [1, 2, 3, 4, 5]
    assert told.events[1:] == [("write_recovered", {"file": str(path), "written": 4, "lost": 0})]


@pytest.fixture
def small_files():
    """Files cannot grow above 30 bytes: a line is taken in part, as on the last block of a disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, hard))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("truncates", [True, False])
def test_a_line_that_was_taken_in_part_spoils_no_other(tmp_path, files, told, small_files, monkeypatch, truncates):
    path = tmp_path / "metrics.jsonl"

    def refuse(*given):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        if not truncates:
            patch.setattr(os, "truncate", refuse)
        for step in (1, 2, 3):
            files.append(path, line(step))
    assert steps(path) == [1, 2] and told.names == ["write_failed"]
    small_files()
    files.append(path, line(4))
    assert steps(path) == [1, 2, 3, 4] and told.names == ["write_failed", "write_recovered"]


def test_the_line_that_a_kill_tore_costs_no_other(tmp_path, files):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st')
    files.append(path, line(2))
    assert steps(path) == [1, 2]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.ESTALE])
def test_whatever_a_disk_says_is_no_error_of_the_run(tmp_path, files, told, monkeypatch, number):
    def refuse(*given, **more):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("dsv3_megatron.run.made.os.open", refuse)
        files.append(tmp_path / "a.jsonl", line(1))
        files.replace(tmp_path / "b.json", "{}")
        files.retry()
    assert [values["reason"] for _, values in told.events] == [os.strerror(number)] * 2
    files.retry()
    assert steps(tmp_path / "a.jsonl") == [1] and (tmp_path / "b.json").read_text() == "{}"
    assert told.names == ["write_failed"] * 2 + ["write_recovered"] * 2


def test_what_is_kept_has_a_bound_and_what_is_lost_is_counted(tmp_path, files, told, monkeypatch):
    monkeypatch.setattr(resilient, "PENDING_BYTES", 3 * len(line(1)))
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    for step in range(1, 8):
        files.append(path, line(step))
    path.unlink()
    files.retry()
    assert steps(path) == [5, 6, 7]
    assert told.events[-1] == ("write_recovered", {"file": str(path), "written": 3, "lost": 4})
    assert told.texts[-1].endswith("3 entries that had waited, 4 are lost")


def test_the_end_of_the_run_tells_what_was_never_written(tmp_path, files, told):
    path, whole = tmp_path / "metrics.jsonl", tmp_path / "summary.json"
    path.symlink_to("/dev/full")
    (tmp_path / "summary.json.tmp").mkdir()
    files.append(path, line(1))
    files.append(path, line(2))
    files.replace(whole, "{}")
    files.close()
    lost = {values["file"]: values["lost"] for name, values in told.events if name == "write_lost"}
    assert lost == {str(path): 2, str(whole): 1}
    assert not any("\n" in text for text in told.texts)


def test_telling_may_write_to_a_file_that_is_refused_itself(tmp_path, monkeypatch):
    """Events are told by events.jsonl, on the same disk."""
    monkeypatch.setattr(resilient, "RETRY_SECONDS", 0.0)
    events, names = tmp_path / "events.jsonl", []

    def tell(name, values, text):
        names.append(name)
        files.append(events, json.dumps({"event": name, "step": len(names)}).encode() + b"\n")

    files = ResilientFiles(tell)
    events.symlink_to("/dev/full")
    files.append(events, line(7))
    assert names == ["write_failed"]
    events.unlink()
    files.append(events, line(8))
    assert [row.get("event") for row in read_json_lines(events)] == [None, "write_failed", None, "write_recovered"]
    events.unlink()
    events.symlink_to("/dev/full")
    files.append(events, line(9))
    files.close()
    assert names == ["write_failed", "write_recovered", "write_failed", "write_lost"]


def test_a_disk_that_refuses_is_left_alone_for_a_while(tmp_path, told):
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    files = ResilientFiles(told)
    files.append(path, line(1))
    path.unlink()
    files.append(path, line(2))
    files.retry()
    assert not path.exists()
    files.flush()
    assert steps(path) == [1, 2]


def test_the_newest_text_of_a_file_counts(tmp_path, files, told):
    whole = tmp_path / "summary.json"
    (tmp_path / "summary.json.tmp").mkdir()
    files.replace(whole, '{"step": 1}')
    files.replace(whole, '{"step": 2}')
    assert told.names == ["write_failed"] and not whole.exists()
    (tmp_path / "summary.json.tmp").rmdir()
    files.retry()
    assert read_json(whole) == {"step": 2} and told.names == ["write_failed", "write_recovered"]


def test_steps_that_are_done_again_are_dropped_from_the_file_and_from_what_waits(tmp_path, files):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3, 4):
        files.append(path, line(step))
    path.rename(tmp_path / "kept")
    path.symlink_to("/dev/full")
    for step in (5, 6):
        files.append(path, line(step))
    path.unlink()
    path.mkdir()  # not even a cut is possible
    files.cut(path, lambda row: row["step"] <= 5)
    files.cut(path, lambda row: row["step"] <= 3)
    files.append(path, line(4))
    path.rmdir()
    (tmp_path / "kept").rename(path)
    files.append(path, line(5))
    assert steps(path) == [1, 2, 3, 4, 5]


# -- reading from the end ----------------------------------------------------------------------------------------------


def bytes_read():
    with open("/proc/thread-self/io") as file:
        return int(file.readline().split()[1])


@pytest.mark.parametrize("torn", [b"", b'{"step": 9', b"\n\n", b"nothing\n" * 30_000])
@pytest.mark.parametrize("size", [0, 100_000, 200_000])
def test_the_last_line_is_found_from_the_end(tmp_path, torn, size):
    path = tmp_path / "expert_load.jsonl"
    rows = [{"step": step, "loads": "x" * size} for step in (1, 2, 3)]
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows) + torn)
    assert last_json_line(path) == rows[-1] == list(iterate_json_lines(path))[-1]
    cut_json_lines(path, lambda row: row["step"] <= 2)
    assert list(iterate_json_lines(path)) == rows[:2] and path.read_bytes().endswith(b"\n")
    cut_json_lines(path, lambda row: False)
    assert path.read_bytes() == b"" and last_json_line(path) is None


def test_neither_the_last_line_nor_a_cut_reads_the_whole_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(json.dumps({"step": step, "more": "x" * 500}).encode() + b"\n" for step in range(40_000)))
    before = bytes_read()
    assert last_json_line(path)["step"] == 39_999
    cut_json_lines(path, lambda row: row["step"] < 39_900)
    assert last_json_line(path)["step"] == 39_899
    assert bytes_read() - before < path.stat().st_size / 50
