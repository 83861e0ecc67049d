"""``dsv3 train --nproc-per-node N`` as a user types it listens to no other host, after a restart of its ranks too."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from launcher.command_line.recipe_files import ROOT
from testing.training.tiny import SMALL


def processes(agent):
    with suppress(psutil.Error):
        return [agent, *agent.children(recursive=True)]
    return []


def listening(agent):
    """Return (process, address) of every port that the agent and its ranks listen at."""
    found = set()
    for process in processes(agent):
        with suppress(psutil.Error):
            connections = process.net_connections("inet")
            found |= {(process.pid, c.laddr.ip) for c in connections if c.status == psutil.CONN_LISTEN}
    return found


@pytest.mark.full
def test_nothing_listens_to_other_hosts(tmp_path):
    command = [sys.executable, "-m", "launcher.dsv3", "train", "--nproc-per-node", "2", "--max-restarts", "1"]
    words = ["recipe=dsv3_tiny", *SMALL, "parallel.pipeline=2", "run.steps=400", "checkpoint.every_steps=2",
             "logging.wandb=disabled", f"run.directory={tmp_path / 'run'}"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "said", "w") as said:
        started = subprocess.Popen([*command, *words], cwd=tmp_path, env=environment, stdout=said, stderr=said)
    agent, found, killed, deadline = psutil.Process(started.pid), set(), None, time.monotonic() + 180
    events = tmp_path / "run" / "events.jsonl"
    while started.poll() is None:
        assert time.monotonic() < deadline, (tmp_path / "said").read_text()
        found |= listening(agent)
        names = [json.loads(line)["event"] for line in events.read_text().splitlines()] if events.exists() else []
        if killed is None and "saved" in names:
            killed = processes(agent)[-1]
            killed.kill()
        if "resumed" in names and (tmp_path / "run" / "metrics.jsonl").exists():
            started.terminate()
        time.sleep(0.1)
    assert "resumed" in events.read_text(), (tmp_path / "said").read_text()
    assert found and {address for _, address in found} == {"127.0.0.1"}
    assert len({process for process, _ in found}) >= 3  # ranks of both starts
    assert "torchrun listens on all" not in (tmp_path / "said").read_text()
