"""Kills at random moments; the long form is ``make chaos``."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dsv3_megatron.checkpoint.manifest import newest_valid
from testing import chaos_memory
from testing.chaos import torment
from testing.ports import free_port
from testing.training.checkpoints import assert_same_tensors
from testing.training.tiny import SMALL
from testing.training.whole_runs import events, steps

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("kills", [2, pytest.param(6, marks=pytest.mark.full)])
def test_chaos_of_kills_loses_no_step_beyond_the_last_checkpoint(tmp_path, kills):
    outcome = torment(kills, seed=7, place=tmp_path)
    assert sum(outcome.kills.values()) == kills and set(outcome.kills) >= {"step", "save"}
    assert outcome.lost_beyond_checkpoint == 0


@pytest.mark.full
def test_chaos_of_kills_and_lost_nodes_loses_no_step_that_memory_still_holds(tmp_path):
    outcome = chaos_memory.torment(5, seed=3, place=tmp_path)
    assert sum(outcome.kills.values()) == 5 and outcome.restarts >= 5


@pytest.mark.slow
@pytest.mark.full
def test_chaos_under_torchrun_which_starts_the_ranks_again(tmp_path):
    words = [
        *SMALL,
        "parallel.expert=2",
        "run.steps=12",
        "checkpoint.every_steps=2",
        f"run.directory={tmp_path / 'run'}",
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2"]
    command = [*torchrun, "--master-port", str(free_port()), "launcher/pretrain.py", *words]
    command += [f"run.directory={tmp_path / 'run'}"]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 240
    while time.monotonic() < deadline and running.poll() is None:
        if newest_valid(tmp_path / "run" / "checkpoints")[0] and len(metrics.read_text().splitlines()) >= 3:
            break
        time.sleep(0.05)
    ranks = [p for p in psutil.Process(running.pid).children(recursive=True) if "pretrain.py" in " ".join(p.cmdline())]
    killed = int(ranks[-1].environ()["RANK"])
    ranks[-1].send_signal(signal.SIGKILL)
    stdout, stderr = running.communicate(timeout=240)
    assert running.returncode == 0, stderr.decode()[-3000:]
    assert [line["step"] for line in steps(tmp_path / "run")] == list(range(1, 13))
    assert len(events(tmp_path / "run", "resumed")) == 1
    (failed,) = events(tmp_path / "run", "failed")  # which of both was killed, though the other one speaks first
    assert (failed["rank"], failed["host"], failed["of_host"]) == (killed, socket.gethostname(), True)
    assert f"a start before failed: rank {killed} on" in stdout.decode()
    assert list((tmp_path / "run" / "failures").iterdir()) == [], "told once; the last start ended as it should"

    calm = [*torchrun, "--master-port", str(free_port()), "launcher/pretrain.py", *words]
    calm += [f"run.directory={tmp_path / 'calm'}"]
    subprocess.run(calm, cwd=ROOT, check=True, capture_output=True, timeout=240)
    final = "checkpoints/step_00000012"
    assert_same_tensors(tmp_path / "run" / final, tmp_path / "calm" / final)
