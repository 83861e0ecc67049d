"""One check in a process of its own: every outcome is on disk before the next begins."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

from benchmarks.gpu_check.outcome import Outcome, Outcomes, Visit
from benchmarks.gpu_check.registry import Check
from parallel.errors import UserError

STACKS = signal.SIGUSR2  # asks a process to write where its threads are
LATER = 5.0  # seconds after its limit at which a process ends by itself: whoever should have ended it is gone


def main(check: Check, visit: Visit, seconds: float, outcomes: Path, log: Path) -> None:
    """Run a check: what it prints goes to ``log``, an outcome a line to ``outcomes``."""
    os.setsid()  # so that whatever it starts can be ended with it
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(written, 1)
    os.dup2(written, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(check.environment)
    signal.setitimer(signal.ITIMER_REAL, seconds + LATER)  # its default action ends a process, wherever that is stuck
    faulthandler.enable(sys.stderr)
    faulthandler.register(STACKS, sys.stderr)  # for one that started late; the next line also where signals wait
    faulthandler.dump_traceback_later(max(seconds - 0.5, seconds / 2), file=sys.stderr)
    if visit.stands_in:
        importlib.import_module(check.stand_ins)  # there already, where the process was forked from it
    with outcomes.open("a", buffering=1) as file:
        for outcome in _run(check, visit):
            file.write(json.dumps(asdict(outcome)) + "\n")
    print(f"{time.process_time():.1f} s of processor time")
    faulthandler.cancel_dump_traceback_later()


def _run(check: Check, visit: Visit) -> Outcomes:
    """Yield the check's outcomes; what it raises is its last."""
    module, function = check.function.split(":")
    try:
        yield from getattr(importlib.import_module(module), function)(visit, *check.arguments)
    except UserError as error:
        traceback.print_exc()
        yield Outcome("FAIL", str(error))
    except Exception as error:
        traceback.print_exc()
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        yield Outcome("FAIL", f"{type(error).__name__}: {lines[0] if lines else ''}")
