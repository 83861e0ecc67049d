"""Work in processes: in order, in one line where a worker is killed, and with no worker left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv3_megatron.run.processes import in_processes
from parallel.errors import DataError

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("workers", [1, 2])
def test_results_are_in_the_order_of_the_work(workers):
    assert in_processes(abs, [-3, 2, -1], workers) == [3, 2, 1]


def test_a_worker_that_is_killed_is_one_line():
    with pytest.raises(DataError, match=r"a worker was killed, .* with fewer than workers = 2"):
        in_processes(os._exit, [1, 1], 2)


def test_workers_end_with_the_process_that_is_killed():
    code = "import time; from dsv3_megatron.run.processes import in_processes; in_processes(time.sleep, [99, 99], 2)"
    process = subprocess.Popen([sys.executable, "-c", f"if __name__ == '__main__': {code}"], cwd=ROOT)

    def workers():
        lines = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return {int(child) for child in lines if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()}

    def wait_until(is_so):
        deadline = time.monotonic() + 60
        while not is_so():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    wait_until(lambda: len(workers()) == 2)
    found = workers()
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not any(Path(f"/proc/{child}").exists() for child in found))
