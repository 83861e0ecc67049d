"""Checks that go wrong, each in a way of its own, for the tests of benchmarks/gpu_check."""

import ctypes
import os
import signal
import subprocess
import time

from benchmarks.gpu_check.outcome import judged
from benchmarks.gpu_check.registry import Check
from parallel.errors import PackageError


def passes(visit):
    yield judged(True, "well", number=7)


def reads(visit):
    yield judged(visit.found["good"]["number"] == 7, "what it reads is there")


def raises(visit):
    yield judged(True, "the first row is known")
    raise ValueError("a value that cannot be\nand more about it")


def refuses(visit):
    raise PackageError("the package is too old; install a newer one")
    yield


def crashes(visit):
    ctypes.string_at(0)
    yield


def is_killed(visit):
    yield judged(True, "before the kill")
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(visit):
    started = subprocess.Popen(["sleep", "100"])
    (visit.scratch / "started").write_text(str(started.pid))
    wait_for_ever()
    yield


def wait_for_ever():
    time.sleep(100)


def says_nothing(visit):
    return iter(())


class Bare(Check):
    """A check that needs nothing of what takes seconds to import."""

    stand_ins = "json"


def faulty(name, function, seconds=60.0, **more):
    """Return a check of this page."""
    return Bare(name, f"tests.benchmarks.gpu_check_faults:{function}", seconds, **more)
