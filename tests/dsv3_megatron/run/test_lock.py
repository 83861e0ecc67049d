"""One job at a time in a run directory."""

import json
import os
import subprocess
import sys
import time

import pytest

from dsv3_megatron.run.lock import STALE_SECONDS, run_lock
from parallel.errors import RunInUseError


def lock_of(directory, age_seconds=0.0, **owner):
    """Write a lock as another owner would have left it."""
    path = directory / "lock"
    path.write_text(json.dumps({"host": "elsewhere", "process": 1, "job": None, "since": "x", **owner}))
    then = time.time() - age_seconds
    os.utime(path, (then, then))


def test_the_lock_is_there_while_the_run_lasts(tmp_path):
    with run_lock(tmp_path):
        owner = json.loads((tmp_path / "lock").read_text())
        assert owner["process"] == os.getpid()
    assert not (tmp_path / "lock").exists()


def test_a_second_trainer_is_refused_with_owner_and_age(tmp_path):
    lock_of(tmp_path, age_seconds=30, job="77")
    with (
        pytest.raises(RunInUseError, match=r"job 77, process 1 on elsewhere \(last sign of life (29|30|31)") as caught,
        run_lock(tmp_path),
    ):
        pass
    assert "\n" not in str(caught.value)
    assert json.loads((tmp_path / "lock").read_text())["job"] == "77"


def test_a_live_process_on_this_host_holds_it_however_old(tmp_path):
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        lock_of(tmp_path, age_seconds=10 * STALE_SECONDS, host=os.uname().nodename, process=sleeper.pid)
        with pytest.raises(RunInUseError), run_lock(tmp_path):
            pass
    finally:
        sleeper.kill()
        sleeper.wait()
    with run_lock(tmp_path):  # the same lock, its owner dead
        pass


@pytest.mark.parametrize("text", [
        "", "{", "[]", "null", "{}", '{"process": 1}', '{"host": "x"}', '{"host": "x", "process": "1"}',
        '{"host": "x", "process": -1}', '{"host": "x", "process": true}', '{"host": ["x"], "process": 1}',
        '{"host": "x", "process": 99999999999}', '{"host": "x", "process": 1, "job": {}}', "[" * 100_000,
    ],
)  # fmt: skip
def test_a_torn_lock_is_nobodys(tmp_path, text):
    (tmp_path / "lock").write_text(text)
    with run_lock(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["process"] == os.getpid()


def test_a_silent_owner_elsewhere_is_taken_over(tmp_path):
    lock_of(tmp_path, age_seconds=STALE_SECONDS + 5)
    with run_lock(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["process"] == os.getpid()


def test_a_requeued_job_takes_its_own_lock_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for earlier in ({"start": 0}, {}, {"host": os.uname().nodename, "process": os.getppid()}):  # {}: an older version's
        lock_of(tmp_path, age_seconds=1, **{"job": "12", **earlier})
        with run_lock(tmp_path):
            assert json.loads((tmp_path / "lock").read_text())["process"] == os.getpid()


@pytest.mark.parametrize("start", ["0", "1"])
def test_another_task_of_the_same_start_of_a_job_holds_it(tmp_path, monkeypatch, start):
    """srun without torchrun, or an agent a node that knows no other: two worlds of one job in one directory."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", start)
    for other in ({}, {"host": os.uname().nodename, "process": os.getppid()}):
        lock_of(tmp_path, age_seconds=30, **{"job": "12", "start": int(start), **other})
        with pytest.raises(RunInUseError, match="job 12, process"), run_lock(tmp_path):
            pass
    lock_of(tmp_path, age_seconds=STALE_SECONDS + 5, job="12", start=int(start))
    with run_lock(tmp_path):
        pass


def test_a_lock_that_was_taken_over_is_left_to_its_new_owner(tmp_path):
    with run_lock(tmp_path):
        lock_of(tmp_path)
    assert json.loads((tmp_path / "lock").read_text())["host"] == "elsewhere"
