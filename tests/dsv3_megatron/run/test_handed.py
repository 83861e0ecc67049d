"""What somebody else has made is opened only where it can be read to its end, and stays inside its folder."""

import os
import socket

import pytest

from dsv3_megatron.run.handed import inside, open_regular, parse_json, read_bytes, read_json_file


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "link to a device", "socket"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    path = tmp_path / "it"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind("it")
    else:
        path = type(path)("/dev/zero")
    with pytest.raises(OSError):
        open_regular(path)


def test_a_file_larger_than_its_reader_expects_is_refused(tmp_path):
    (tmp_path / "it").write_bytes(b"x" * 11)
    assert read_bytes(tmp_path / "it", 11) == b"x" * 11
    with pytest.raises(ValueError, match="more than 10 bytes"):
        read_bytes(tmp_path / "it", 10)


def test_json_that_is_nested_too_deeply_is_a_value_error(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(ValueError):
        read_json_file(tmp_path / "deep.json")
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(b'{"a":' * 200_000 + b"1" + b"}" * 200_000)


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../../x", "a/..", "out", "sub/out", "nul\0"])
def test_a_name_does_not_leave_its_folder(tmp_path, name):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "out").symlink_to("/etc/passwd")
    (folder / "sub" / "out").symlink_to("../../elsewhere")
    with pytest.raises(ValueError):
        inside(folder, name)


def test_names_and_links_within_the_folder_are_taken(tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "link").symlink_to("sub/file")
    assert inside(folder, "sub/file") == folder / "sub" / "file"
    assert inside(folder, "link") == folder / "link"
    (tmp_path / "alias").symlink_to(folder)  # the folder itself may be reached by a link
    assert inside(tmp_path / "alias", "link") == tmp_path / "alias" / "link"


def test_a_link_that_leads_to_itself_is_what_the_system_refuses(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="Too many levels"):
        read_bytes(inside(tmp_path, "loop"))


def test_a_snapshot_of_the_hubs_cache_may_lead_to_its_blobs_alone(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    (snapshot / "other.json").symlink_to("../../../models--c--d/blobs/abc")
    assert inside(snapshot, "config.json") == snapshot / "config.json"
    with pytest.raises(ValueError, match="link out of the folder.*; make it a hard link or a copy"):
        inside(snapshot, "other.json")
