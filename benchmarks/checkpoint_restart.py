"""How soon a killed run goes on: the third part of benchmarks/checkpoints.py.

Seconds from kill -9 of a rank under torchrun until its successors have done a step, compared with nothing.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.checkpoint_saves import BASE

ROOT = Path(__file__).resolve().parent.parent


def restart(place: Path) -> dict[str, float]:
    """Return seconds from the kill of a rank to the first step that its successors finish."""
    import psutil

    words = [*BASE, "parallel.expert=2", "optim.global_batch=4", "run.steps=100000", "checkpoint.every_steps=5"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "--max-restarts", "1", "launcher/pretrain.py", *words, f"run.directory={place / 'run'}"]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    events, metrics = place / "run" / "events.jsonl", place / "run" / "metrics.jsonl"

    def wait_until(happened: Callable[[], bool]) -> float:
        deadline = time.monotonic() + 300
        while not happened():
            if time.monotonic() > deadline or running.poll() is not None:
                raise RuntimeError("the run did not get there")
            time.sleep(0.02)
        return time.monotonic()

    def lines(path: Path) -> int:
        return len(path.read_text().splitlines()) if path.exists() else 0

    try:
        wait_until(lambda: lines(events) >= 1 and lines(metrics) > 6)
        ranks = psutil.Process(running.pid).children(recursive=True)
        victim = next(p for p in ranks if "pretrain.py" in " ".join(p.cmdline()))
        killed = time.monotonic()
        victim.send_signal(signal.SIGKILL)
        resumed = wait_until(lambda: '"resumed"' in events.read_text())
        there = lines(metrics)
        stepped = wait_until(lambda: lines(metrics) > there)
        return {"kill_to_resumed_seconds": resumed - killed, "kill_to_next_step_seconds": stepped - killed}
    finally:
        running.terminate()
        running.wait(timeout=120)
