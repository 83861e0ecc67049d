"""What a host's memory holds of runs: whose folders they are, how much room is left, what is over and what is not."""

import json
import os
from pathlib import Path

import pytest

from dsv3_megatron.checkpoint.memory import host
from dsv3_megatron.checkpoint.memory.folder import MemoryFolder, State, remove_folders, top_folder
from dsv3_megatron.checkpoint.memory.leftovers import clear_leftovers, describe_leftovers
from dsv3_megatron.checkpoint.memory.lives import Lives, new_life, read_lives
from dsv3_megatron.run.directory import RunDirectory
from parallel.errors import CheckpointError, LayoutError, RecipeError
from parallel.world import host_name

RUN, OTHER = "0123456789abcdef", "fedcba9876543210"


def folder_with(root, run=RUN, name="node1", states=()):
    folder = MemoryFolder(root, run, name)
    folder.create(root / "runs" / run)
    for state, rank in states:
        folder.share(state, rank).mkdir(parents=True)
    return folder


def test_folders_are_their_owners_alone_and_hold_what_was_put_there(tmp_path):
    old, new = State(4, new_life()), State(6, new_life())
    folder = folder_with(tmp_path, states=[(old, 0), (new, 0), (new, 17)])
    for each in (top_folder(tmp_path), folder.path.parent, folder.path):
        assert each.stat().st_mode & 0o777 == 0o700
    (folder.path / "step_00000006-../x").mkdir(parents=True)  # no name of ours
    assert {(state, rank) for state, rank, _ in folder.shares()} == {(old, 0), (new, 0), (new, 17)}
    remove_folders(folder.all_but(new))
    assert {state for state, *_ in folder.shares()} == {new}
    folder.remove()
    assert not top_folder(tmp_path).exists()


def test_a_run_removes_nothing_of_another_or_of_another_node(tmp_path):
    """Several nodes are played on one machine."""
    mine, other, neighbour = (
        folder_with(tmp_path, states=[(State(2, "0" * 8), 0)]),
        folder_with(tmp_path, OTHER, states=[(State(2, "0" * 8), 0)]),
        folder_with(tmp_path, name="node2", states=[(State(2, "0" * 8), 0)]),
    )
    mine.remove()
    assert not mine.path.exists() and list(other.shares()) and list(neighbour.shares())


@pytest.mark.parametrize("what", ["link", "file", "open to others"])
def test_a_folder_that_somebody_else_may_have_made_is_refused(tmp_path, what):
    top = top_folder(tmp_path)
    if what == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        top.symlink_to(tmp_path / "elsewhere")
    elif what == "file":
        top.write_text("")
    else:
        top.mkdir()
        top.chmod(0o777)
    with pytest.raises(RecipeError, match=r"checkpoint\.memory_path"):
        folder_with(tmp_path)


def test_a_path_that_is_not_there_is_refused_in_a_line(tmp_path):
    with pytest.raises(RecipeError, match="is no folder; name one that every node has"):
        MemoryFolder(tmp_path / "nowhere", RUN, "node1").create(tmp_path)


def test_names_of_hosts_are_slurms_and_names_of_folders(monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    assert host_name() == "node7"
    monkeypatch.setenv("SLURMD_NODENAME", "../node7")
    with pytest.raises(LayoutError, match="no name of a host; unset it"):
        host_name()
    monkeypatch.delenv("SLURMD_NODENAME")
    assert host_name() == os.uname().nodename


def test_the_shared_memory_of_linux_is_memory(tmp_path):
    if not Path("/dev/shm").is_dir():
        pytest.skip("no /dev/shm here")
    assert host._is_memory(Path("/dev/shm")) and not host._is_memory(Path("/proc"))
    assert 0 < host.free_bytes(Path("/dev/shm")) < host.shutil.disk_usage("/dev/shm").free


def test_the_room_of_a_file_system_in_memory_is_that_of_host_and_job_too(tmp_path, monkeypatch):
    """A job's group may use 10 GiB, uses 8, and 3 of those are files that the system takes back: 5 are left, of which 1
    is for processes. A group above has less left and counts as well."""
    gib = 1 << 30
    monkeypatch.setattr(host, "_is_memory", lambda folder: True)
    monkeypatch.setattr(host, "_host_has", lambda: 64 * gib)
    monkeypatch.setattr(host.shutil, "disk_usage", lambda folder: type("", (), {"free": 32 * gib}))
    (memberships := tmp_path / "cgroup").write_text("1:cpu:/x\n0::/job/step\n")
    step = tmp_path / "job/step"
    step.mkdir(parents=True)

    def group(folder, most, used, files):
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\nactive_file {files}\ninactive_file 0\nshmem 4\n")

    group(step, 10 * gib, 8 * gib, 3 * gib)
    group(step.parent, "max", 8 * gib, 0)
    job = host._job_may_use
    monkeypatch.setattr(host, "_job_may_use", lambda *given: job(tmp_path, memberships))
    assert host.free_bytes(tmp_path) == 4 * gib
    group(step.parent, 12 * gib, 10 * gib, 0)
    assert host.free_bytes(tmp_path) == 1 * gib
    group(step.parent, 12 * gib, 12 * gib, 0)
    assert host.free_bytes(tmp_path) == 0
    monkeypatch.setattr(host, "_is_memory", lambda folder: False)
    assert host.free_bytes(tmp_path) == 32 * gib


def test_only_the_last_life_and_what_it_has_begun_with_count(tmp_path):
    path = tmp_path / "memory.json"
    lives = read_lives(path)
    assert lives.life is None and not lives.may_load(State(3, "a" * 8))
    Lives(lives.run, "b" * 8, State(3, "a" * 8)).write(path)
    again = read_lives(path)
    assert again.run == lives.run
    assert again.may_load(State(3, "a" * 8)) and again.may_load(State(9, "b" * 8))
    assert not again.may_load(State(5, "a" * 8)) and not again.may_load(State(9, "c" * 8))
    path.write_text(json.dumps({"run": "../..", "life": None}))
    with pytest.raises(CheckpointError, match=r"memory\.json cannot be read \(run: .*remove it"):
        read_lives(path)


def test_memory_of_runs_that_are_over_is_freed_and_of_others_told(tmp_path):
    def run_directory(run, **says):
        directory = RunDirectory(tmp_path / "runs" / run)
        directory.path.mkdir(parents=True)
        Lives(says.get("id", run)).write(directory.memory)
        for name in says.get("files", ()):
            (directory.path / name).write_text("{}")
        folder = folder_with(tmp_path, run, states=[(State(2, "0" * 8), 0)])
        (folder.share(State(2, "0" * 8), 0) / "x").write_bytes(b"1234")
        return folder.path

    mine = run_directory(RUN)
    finished = run_directory("a" * 16, files=["finished"])
    anew = run_directory("b" * 16, id="c" * 16)
    stopped = run_directory("d" * 16)
    training = run_directory("e" * 16, files=["lock", "finished"])  # begun again: finished goes in a moment
    found = clear_leftovers(tmp_path, RUN)
    assert [each.exists() for each in (mine, finished, anew, stopped, training)] == [True, False, False, True, True]
    assert [(each.directory[-1], each.is_removed) for each in found] == [("a", True), ("b", True), ("d", False)]
    assert all(each.bytes >= 4 for each in found)
    lines = describe_leftovers([*found, found[-1]._replace(path="elsewhere")])
    assert [line.partition(" ")[0] for line in lines] == ["freed", "freed", "warning:"]
    assert lines[-1].endswith("and on 1 more nodes")
