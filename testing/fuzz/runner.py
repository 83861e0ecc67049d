"""One target: read damaged files one after another, in a process of its own that may not take long or much memory.

A target is a test under tests/fuzz/ that asks for the fixture ``fuzz``:

    def test_a_manifest(fuzz, tmp_path):
        good = write_a_checkpoint(tmp_path)
        fuzz(json_text, [good.read_bytes()], lambda data: read_manifest(written(good, data)))

It gives a kind of damage (mutate.py), good files as seeds, and a function that gets a damaged file's bytes, puts them
where its reader looks, and reads. The function returns - and asserts beforehand that what was read is right, as far as
that can be said of a damaged file - or raises a UserError of one line. Everything else is a finding: another exception,
MemoryError, more than ``CASE_SECONDS`` of a processor, no end in ``WAIT_SECONDS``, the death of the process.

Cases are made of a seed and a number: ``DSV3_FUZZ_CASE=12:345`` runs case 345 of seed 12 alone, in the test's own
process. ``DSV3_FUZZ_SECONDS`` and ``DSV3_FUZZ_SEED`` choose how long and which; `make fuzz` sets them. Seconds are of a
processor, not of a clock: on a busy machine a target reads as many files as elsewhere, and none is too slow for that.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import resource
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from types import FrameType

from parallel.errors import UserError
from testing.fuzz.mutate import Mutation

SHORT_SECONDS, LONG_SECONDS = 0.5, 1.0  # of a target, in the fast lane and in the other; `make fuzz`: a minute
CASE_SECONDS = 5.0
WAIT_SECONDS = 30.0  # by the clock: a case that waits for what never comes
DEATH_SECONDS = 60.0  # likewise; a case that no signal ends: native code in a loop
MEMORY_BYTES = 2 << 30
FINDINGS = 5  # different ones, after which a target stops

_END = ("end", "")

Read = Callable[[bytes], object]


class TookTooLong(BaseException):
    """A case ran for more than its seconds. No Exception: the reader must not take it for a damaged file."""


def fuzz(damage: Mutation, seeds: Sequence[bytes], read: Read, seconds: float) -> int:
    """Read damaged seeds for so many seconds of a processor; return how many cases that were.

    Raises AssertionError: what went wrong, by place, with the case that shows it.
    """
    for data in seeds:
        read(data)  # what is undamaged can be read
    if one := os.environ.get("DSV3_FUZZ_CASE"):
        seed, number = map(int, one.split(":"))
        read(_case(damage, seeds, seed, number))
        return 1
    seconds = float(os.environ.get("DSV3_FUZZ_SECONDS", seconds))
    seed = int(os.environ.get("DSV3_FUZZ_SEED", 1))
    findings: dict[str, str] = {}
    number, left = 0, seconds
    while left > 0 and len(findings) < FINDINGS:
        number, used = _in_a_child(damage, seeds, read, seed, number, left, findings)
        left -= used
    assert not findings, f"{len(findings)} findings in {number} cases:\n" + "\n".join(findings.values())
    return number


def _in_a_child(
    damage: Mutation,
    seeds: Sequence[bytes],
    read: Read,
    seed: int,
    first: int,
    seconds: float,
    findings: dict[str, str],
) -> tuple[int, float]:
    """Run cases in a child until the time is over, or the child dies of one; return the number of the next case, and
    the processor's seconds that were used."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(
        target=_cases, args=(damage, seeds, read, seed, first, seconds, theirs), daemon=True
    )
    child.start()
    theirs.close()
    number, used, started = first, 0.0, time.monotonic()
    with suppress(EOFError):
        while True:
            if not ours.poll(DEATH_SECONDS):
                os.kill(child.pid or 0, signal.SIGKILL)
                break
            number, found, used = ours.recv()
            if found == _END:
                child.join()
                return number, used
            started = time.monotonic()
            if found:
                findings.setdefault(found[0], f"DSV3_FUZZ_CASE={seed}:{number}: {found[1]}")
                if len(findings) >= FINDINGS:
                    child.kill()
                    return number + 1, used
    child.join()
    what = f"the process ended with {child.exitcode} after {time.monotonic() - started:.0f} s"
    findings.setdefault(f"death {child.exitcode}", f"DSV3_FUZZ_CASE={seed}:{number}: {what}")
    return int(number) + 1, used + CASE_SECONDS  # what it died of counts too, or a target that always dies has no end


def _cases(
    damage: Mutation, seeds: Sequence[bytes], read: Read, seed: int, number: int, seconds: float, report: Connection
) -> None:
    """Send, for every case, (number, None, the seconds used so far); after one with a finding, again with (place, text)
    in the middle. Last: (the next number, ``_END``, the seconds)."""
    gc.freeze()  # what earlier tests have left is not this process's to collect: old process groups die of it
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    signal.signal(signal.SIGPROF, _too_long)
    signal.signal(signal.SIGALRM, _waits)
    _limit_memory()
    begun, waited = time.process_time(), 0.0
    while (used := time.process_time() - begun + waited) < seconds:
        report.send((number, None, used))
        start = time.monotonic()
        if found := _finding(read, _case(damage, seeds, seed, number)):
            waited += time.monotonic() - start  # by the clock: else a target whose cases all wait has no end
            report.send((number, found, used))
        number += 1
    report.send((number, _END, used))
    report.close()
    os._exit(0)


def _finding(read: Read, data: bytes) -> tuple[str, str] | None:
    """Return where and what went wrong; None where the file was read, or refused in one line."""
    signal.setitimer(signal.ITIMER_PROF, CASE_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WAIT_SECONDS)
    try:
        read(data)
    except UserError as error:
        return ("lines", f"a refusal of more than one line: {error!s:.300}") if "\n" in str(error) else None
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        places = [f"{os.path.basename(frame.filename)}:{frame.lineno}" for frame in frames[-6:]]
        said = " ".join(traceback.format_exception_only(error)[-1].split())[:300]
        return f"{type(error).__name__} {places[-1]}", f"{said} ({' < '.join(reversed(places))}); of {len(data)} bytes"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return None


def _case(damage: Mutation, seeds: Sequence[bytes], seed: int, number: int) -> bytes:
    dice = random.Random(f"{seed}:{number}")
    return damage(dice.choice(seeds), seeds, dice)


def _limit_memory() -> None:
    """Let this process take ``MEMORY_BYTES`` more than it has: an allocation beyond that is a MemoryError."""
    with open("/proc/self/status") as file:
        now = next(int(line.split()[1]) << 10 for line in file if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (now + MEMORY_BYTES, now + MEMORY_BYTES))


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TookTooLong(f"more than {CASE_SECONDS:.0f} s of a processor")


def _waits(number: int, frame: FrameType | None) -> None:
    raise TookTooLong(f"no end in {WAIT_SECONDS:.0f} s")
