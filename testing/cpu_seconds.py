"""Processor time of tests: of this process, of the commands it has run, and of the ranks that its servers have forked.

Wall clock says little on a machine that does other work too. What a test has started and not waited for is counted with
the test in which it ends.
"""

from __future__ import annotations

import os
from multiprocessing import forkserver
from pathlib import Path

from testing.fork_servers import servers


def cpu_seconds() -> float:
    """Return the processor time spent so far, user and system."""
    return sum(os.times()[:4]) + sum(_of_server(server) for server in [forkserver._forkserver, *servers()])


def _of_server(server: forkserver.ForkServer) -> float:
    """Return the time of a fork server and of its children that have ended; Linux says it, elsewhere it is 0."""
    try:
        fields = Path(f"/proc/{server._forkserver_pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")  # utime, stime, cutime, cstime
