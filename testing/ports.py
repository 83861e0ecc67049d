"""TCP ports for processes that must be told one before any of them listens."""

from __future__ import annotations

import os
import random
import socket

_FIRST, _EACH = 20000, 1000  # below the range from which the system gives ports away
_random = random.SystemRandom()  # hypothesis seeds the usual one: two test processes would choose the same ports


def free_port() -> int:
    """Return a TCP port that nobody has bound. Workers of pytest-xdist choose from different ranges."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 10
    while True:
        port = _FIRST + _EACH * worker + _random.randrange(_EACH)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
