"""What a process does with a signal, as Linux knows it."""

from __future__ import annotations

import re
import signal
from pathlib import Path


def catches(pid: int, number: signal.Signals) -> bool:
    """Return whether a process has a handler of the signal by now. Raises OSError: it has ended."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)
