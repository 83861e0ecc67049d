"""A command writes again what it has written, and knows what somebody else has put there."""

import os

import pytest

from dsv3_megatron.run.written import WrittenFiles

MARK = ".made.json"


def test_what_was_there_before_is_anothers(tmp_path):
    (tmp_path / "a").write_text("x")
    assert WrittenFiles(tmp_path, MARK).other(["b", "a"]) == "a"
    assert WrittenFiles(tmp_path, MARK).other(["b"]) is None
    assert WrittenFiles(tmp_path / "nowhere", MARK).other(["a"]) is None


def test_a_command_that_was_stopped_knows_what_it_was_to_write(tmp_path):
    WrittenFiles(tmp_path, MARK).begin(["a", "b"])
    (tmp_path / "a").write_text("x")
    assert WrittenFiles(tmp_path, MARK).other(["a", "b", "c"]) is None
    (tmp_path / "c").write_text("x")
    assert WrittenFiles(tmp_path, MARK).other(["a", "b", "c"]) == "c"


def test_a_finished_file_that_was_changed_is_anothers(tmp_path):
    files = WrittenFiles(tmp_path, MARK)
    files.begin(["a", "b"])
    (tmp_path / "a").write_text("x")
    files.end(["a", "b"])
    assert files.other(["a", "b"]) is None
    (tmp_path / "a").write_text("y")
    os.utime(tmp_path / "a", ns=(1, 1))
    assert files.other(["a"]) == "a"
    (tmp_path / "b").write_text("of another")
    assert files.other(["b"]) == "b"


def test_a_link_in_a_files_place_is_anothers(tmp_path):
    files = WrittenFiles(tmp_path, MARK)
    files.begin(["a"])
    (tmp_path / "a").symlink_to("/etc/passwd")
    assert files.other(["a"]) == "a"


@pytest.mark.parametrize("text", ["", "null", "[]", '{"files": 3, "writing": {}}', '{"files": {"a": null}}', "\0"])
def test_a_mark_that_says_nothing_vouches_for_nothing(tmp_path, text):
    (tmp_path / MARK).write_text(text)
    (tmp_path / "a").write_text("x")
    assert WrittenFiles(tmp_path, MARK).other(["a"]) == "a"


def test_a_mark_that_is_a_link_is_not_followed(tmp_path):
    WrittenFiles(tmp_path, MARK).begin(["a"])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / MARK).symlink_to(tmp_path / MARK)
    (tmp_path / "folder" / "a").write_text("x")
    assert WrittenFiles(tmp_path / "folder", MARK).other(["a"]) == "a"
