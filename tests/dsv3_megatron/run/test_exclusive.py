"""One process at a time, with flock and where the file system has none."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import time

import pytest

from dsv3_megatron.checkpoint.manifest import sync_folder
from dsv3_megatron.run.exclusive import NO_FLOCK, STALE_SECONDS, discard, exclusive, owner_of
from launcher.command_line.last_words import ERROR_FILE, Failure, _Host

# Writes that it is in, waits, writes that it is out; flock says the errno given, if any.
WORKER = """
import fcntl, os, sys, time
from pathlib import Path
from dsv3_megatron.run.exclusive import exclusive
if int(sys.argv[2]):
    def flock(*given):
        raise OSError(int(sys.argv[2]), "no flock here")
    fcntl.flock = flock
place = Path(sys.argv[1])
for _ in range(4):
    with exclusive(place / "lock"):
        with (place / "log").open("a") as log:
            log.write(f"in {os.getpid()}\\n"); log.flush(); time.sleep(0.02); log.write(f"out {os.getpid()}\\n")
"""


@pytest.fixture(params=sorted(NO_FLOCK), ids=errno.errorcode.get)
def no_flock(request, monkeypatch):
    def refuse(*given):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.parametrize("said", [0, errno.ENOSYS])
def test_processes_are_in_one_after_another(tmp_path, said):
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), str(said)]) for _ in range(4)]
    assert [worker.wait(timeout=120) for worker in workers] == [0] * 4
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 32
    for entered, left in zip(lines[::2], lines[1::2], strict=True):
        assert entered.split() == ["in", left.split()[1]] and left.startswith("out")
    assert {path.name for path in tmp_path.iterdir()} == {"lock", "log"}


def test_it_is_held_and_given_back_where_there_is_no_flock(tmp_path, no_flock):
    with exclusive(tmp_path / "lock"):
        assert owner_of(tmp_path / "lock.held")["process"] == os.getpid()
    assert not (tmp_path / "lock.held").exists()
    with pytest.raises(ZeroDivisionError), exclusive(tmp_path / "lock"):
        raise ZeroDivisionError
    assert not (tmp_path / "lock.held").exists()


def test_another_error_of_the_disk_is_an_error(tmp_path, monkeypatch):
    def refuse(*given):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="Input/output"), exclusive(tmp_path / "lock"):
        pass


def held_by(tmp_path, age_seconds=0.0, text=None, **owner):
    path = tmp_path / "lock.held"
    path.write_text(json.dumps({"process": 1, "job": None, **owner}) if text is None else text)
    then = time.time() - age_seconds
    os.utime(path, (then, then))


def test_whoever_is_gone_holds_nothing(tmp_path, no_flock):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for left in (
        {"host": socket.gethostname(), "process": dead.pid},
        {"host": "elsewhere", "age_seconds": STALE_SECONDS + 5},
        {"text": "", "age_seconds": STALE_SECONDS + 5},  # killed between making it and writing into it
    ):
        held_by(tmp_path, **left)
        with exclusive(tmp_path / "lock"):
            assert owner_of(tmp_path / "lock.held")["process"] == os.getpid()


def test_a_lock_that_was_taken_meanwhile_is_left_to_its_owner(tmp_path):
    """Two processes saw the same dead owner; the other one was first."""
    held_by(tmp_path, host="elsewhere", process=7)
    discard(tmp_path / "lock.held", {"host": "elsewhere", "process": 1, "job": None, "start": 0})
    assert owner_of(tmp_path / "lock.held") == {"host": "elsewhere", "process": 7, "job": None, "start": 0}
    discard(tmp_path / "lock.held", {"host": "elsewhere", "process": 7, "job": None, "start": 0})
    assert list(tmp_path.iterdir()) == []


def test_last_words_are_said_without_flock(tmp_path, no_flock, monkeypatch, capfd):
    with exclusive(tmp_path / "lock"):
        assert (tmp_path / "lock.held").exists()
    error_file = tmp_path / "attempt_0" / "0" / "error.json"
    error_file.parent.mkdir(parents=True)
    monkeypatch.setenv(ERROR_FILE, str(error_file))
    monkeypatch.setenv("RANK", "0")
    assert _Host(error_file, None).enter(Failure("data: a mistake", "", 2)) == (True, True)
    assert _Host(error_file, None).enter(Failure("data: a mistake", "", 2)) == (False, False)
    assert capfd.readouterr().err.count("data: a mistake") == 1


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO, errno.ENOSPC])
def test_a_folder_that_cannot_be_synced_is_no_error_where_there_is_no_such_notion(tmp_path, monkeypatch, number):
    def refuse(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.fsync", refuse)
    if number in (errno.EINVAL, errno.ENOTSUP):
        sync_folder(tmp_path)
        return
    with pytest.raises(OSError, match=os.strerror(number)):
        sync_folder(tmp_path)
