"""What this program writes lands under the name it means: a link in its place changes no other file."""

import os

import pytest

from dsv3_megatron.run.exclusive import exclusive
from dsv3_megatron.run.files import cut_json_lines, write_atomically
from dsv3_megatron.run.made import appended_file, for_owner, new_file
from dsv3_megatron.run.resilient import ResilientFiles


@pytest.fixture
def elsewhere(tmp_path):
    path = tmp_path / "elsewhere"
    path.write_text("precious")
    yield path
    assert path.read_text() == "precious"


def test_a_new_file_takes_the_place_of_a_link(tmp_path, elsewhere):
    (tmp_path / "new").symlink_to(elsewhere)
    with new_file(tmp_path / "new") as file:
        file.write(b"mine")
    assert (tmp_path / "new").read_bytes() == b"mine" and not (tmp_path / "new").is_symlink()


def test_an_atomic_write_follows_no_link(tmp_path, elsewhere):
    (tmp_path / "recipe.yaml").symlink_to(elsewhere)
    (tmp_path / "recipe.yaml.tmp").symlink_to(elsewhere)
    write_atomically(tmp_path / "recipe.yaml", "mine")
    assert (tmp_path / "recipe.yaml").read_text() == "mine" and not (tmp_path / "recipe.yaml").is_symlink()


@pytest.mark.parametrize("target", ["file", "nothing"])
def test_nothing_is_appended_through_a_link(tmp_path, elsewhere, target):
    path = tmp_path / "metrics.jsonl"
    path.symlink_to(elsewhere if target == "file" else tmp_path / "nowhere")
    with pytest.raises(OSError, match="is a link"):
        appended_file(path)
    told = []
    files = ResilientFiles(lambda name, values, text: told.append(text))
    files.append(path, b"{}\n")
    assert "is a link" in told[0]
    assert not (tmp_path / "nowhere").exists()


def test_a_lock_is_not_taken_through_a_link(tmp_path, elsewhere):
    (tmp_path / "packing.lock").symlink_to(elsewhere)
    with pytest.raises(OSError, match="is a link"), exclusive(tmp_path / "packing.lock"):
        pass


def test_nothing_is_appended_to_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "events.jsonl")
    with pytest.raises(OSError, match="not a regular file"):
        appended_file(tmp_path / "events.jsonl")


def test_nothing_is_cut_through_a_link(tmp_path, elsewhere):
    (tmp_path / "metrics.jsonl").symlink_to(elsewhere)
    with pytest.raises(OSError, match="is a link"):
        cut_json_lines(tmp_path / "metrics.jsonl", lambda row: False)


@pytest.mark.parametrize(
    ("users", "readers", "mode"),
    [(0o022, "owner", 0o600), (0o022, "group", 0o640), (0o002, "group", 0o640), (0o077, "group", 0o600)],
)
def test_files_are_made_for_their_owner_or_the_group(tmp_path, monkeypatch, users, readers, mode):
    """``users``: what the user's shell says. A process that another of ours has started still knows it."""
    monkeypatch.delenv("DSV3_UMASK", raising=False)
    before = os.umask(users)
    try:
        for_owner()
        for_owner(readers)
        for_owner(readers)
        write_atomically(tmp_path / "it", "text")
        (tmp_path / "folder").mkdir()
    finally:
        os.umask(before)
        monkeypatch.delenv("DSV3_UMASK", raising=False)
    assert (tmp_path / "it").stat().st_mode & 0o777 == mode
    assert (tmp_path / "folder").stat().st_mode & 0o777 == (mode | 0o100 | (0o010 if mode & 0o040 else 0))


def test_a_umask_that_is_none_of_ours_is_not_believed(monkeypatch):
    monkeypatch.setenv("DSV3_UMASK", "zz")
    before = os.umask(0o022)
    try:
        for_owner("group")
        assert os.umask(0) == 0o027 | 0o022
    finally:
        os.umask(before)
