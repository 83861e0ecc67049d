"""Write the report of a run directory: python -m dsv3_megatron.report DIRECTORY [NICENESS].

The run itself starts it so, every minute or so: a process of its own, that yields to everything else on the host. What
goes wrong is one line on stderr.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from dsv3_megatron.report.page import write_report


def main(directory: str, niceness: str = "0") -> int:
    """Return the exit code: 0, or 1 where there is no new report. ``niceness``: of the process; 19 yields to all."""
    os.nice(int(niceness))
    try:
        write_report(Path(directory))
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        print(" ".join(reason.split())[:300], file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
