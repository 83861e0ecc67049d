"""Runs checks, each in a process of its own with a time limit of its own, inside the time of the whole visit.

A process that crashes, hangs or is killed costs its own rows only. Checks that measure run alone; others share the
machine, ``workers`` at a time.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from multiprocessing import connection
from multiprocessing.context import BaseContext
from pathlib import Path

from benchmarks.gpu_check import child
from benchmarks.gpu_check.outcome import Outcome, Row, Visit
from benchmarks.gpu_check.registry import Check
from benchmarks.gpu_table import reason
from dsv3_megatron.run.files import read_json_lines

# A check is not started with less than this share of its limit left: it would most likely be cut off.
LEAST = 0.4
ASKING = 3.0  # seconds that a process which takes too long may take to say where it is
_STACK = "most recent call first"


@dataclass
class _Running:
    check: Check
    process: multiprocessing.Process
    since: float
    limit: float
    outcomes: Path
    log: Path


class Runner:
    """One visit of a machine."""

    def __init__(
        self,
        visit: Visit,
        seconds: float,
        *,
        workers: int = 1,
        patience: float = 1.0,
        context: BaseContext | None = None,
        forked: Callable[[Check], AbstractContextManager] = lambda check: nullcontext(),
        told: Callable[[Row], None] = lambda row: None,
    ):
        """Take the time of all checks together.

        Args:
            workers: checks that may run at once.
            patience: by which every check's own limit is multiplied, where a machine is slow or shared.
            context: how processes start; None = each is a new interpreter, as CUDA wants it.
            forked: entered while a check's process is started.
            told: gets every row as soon as it is known.
        """
        self.visit, self.rows = visit, []
        self._seconds, self._workers, self._told, self._forked = seconds, workers, told, forked
        self._patience = patience
        self._context = context or multiprocessing.get_context("spawn")
        self._end = time.monotonic() + seconds
        self._running: list[_Running] = []

    def run(self, checks: Sequence[Check]) -> list[Row]:
        """Return the rows of all checks, in the order in which they became known."""
        waiting = list(checks)
        self.visit.logs.mkdir(parents=True, exist_ok=True)
        try:
            while waiting or self._running:
                waiting = self._start_what_can(waiting)
                if self._running:
                    connection.wait([one.process.sentinel for one in self._running], timeout=0.1)
                    self._reap()
        finally:
            for one in self._running:
                _end(one.process)
        return self.rows

    # -- starting ------------------------------------------------------------------------------------------------------

    def _start_what_can(self, waiting: list[Check]) -> list[Check]:
        """Start checks in their order as far as there is room; return those that still wait."""
        here = {name for check in waiting for name in check.fills} | {n for r in self._running for n in r.check.fills}
        kept: list[Check] = []
        for number, check in enumerate(waiting):
            unknown = [name for name in check.after if name in here]
            if (why := self._why_not(check)) and not unknown:
                for name in check.fills:
                    self._tell(Row(name, "SKIPPED", why, 0.0))
            elif unknown:
                kept.append(check)
            elif not self._has_room(check):
                return [*kept, *waiting[number:]]  # nothing passes what waits for its turn
            else:
                self._start(check)
        return kept

    def _has_room(self, check: Check) -> bool:
        if check.alone:
            return not self._running
        return len(self._running) < self._workers and not any(one.check.alone for one in self._running)

    def _why_not(self, check: Check) -> str | None:
        """Return why a check cannot be run, or None."""
        if lacks := check.lacks(self.visit):
            return lacks
        if missing := [name for name in check.after if name not in self.visit.found]:
            return f"needs what the row '{missing[0]}' finds, and that has not passed"
        if (left := self._end - time.monotonic()) < LEAST * self._limit(check):
            return f"{max(left, 0):.0f} of {self._seconds:.0f} s were left, and it may take {self._limit(check):.0f}"
        return None

    def _limit(self, check: Check) -> float:
        return check.seconds * self._patience

    def _start(self, check: Check) -> None:
        stem = re.sub(r"\W+", "_", check.name)
        outcomes, log = self.visit.scratch / f"{stem}.jsonl", self.visit.logs / f"{stem}.log"
        outcomes.write_text("")
        log.write_text("")
        limit = min(self._limit(check), self._end - time.monotonic())
        scratch = self.visit.scratch / stem
        scratch.mkdir()
        given = replace(self.visit, scratch=scratch)
        process = self._context.Process(target=child.main, args=(check, given, limit, outcomes, log))
        with self._forked(check):
            process.start()
        self._running.append(_Running(check, process, time.monotonic(), limit, outcomes, log))

    # -- ending --------------------------------------------------------------------------------------------------------

    def _reap(self) -> None:
        """Take in what has ended, and end what takes too long."""
        for one in list(self._running):
            took = time.monotonic() - one.since
            if over := one.process.is_alive() and took > one.limit:
                _ask_for_stacks(one)
                _end(one.process)
            if over or not one.process.is_alive():
                one.process.join()
                self._running.remove(one)
                self._take_in(one, took, why=self._too_long(one) if over else _how_it_ended(one))

    def _take_in(self, one: _Running, took: float, why: Outcome | None) -> None:
        """Tell the rows of a process that has ended; ``why`` it did so, where that was not its own wish."""
        found = _outcomes(one.outcomes)[: len(one.check.fills)]
        missing = one.check.fills[len(found) :]
        if why is not None and not missing and {why.status, found[-1].status} == {"FAIL", "PASS"}:
            found, missing = found[:-1], one.check.fills[-1:]  # all was found, and then it broke
        for name, outcome in zip(one.check.fills, found):
            self._tell(Row(name, outcome.status, outcome.said, round(took, 1), outcome.facts, str(one.log)))
        if missing and why is None:
            if found and found[-1].status == "FAIL":
                why = Outcome("SKIPPED", f"comes after '{one.check.fills[len(found) - 1]}' in one process")
            else:
                why = Outcome("FAIL", "its process ended without having said anything of it")
        for name in missing:
            self._tell(Row(name, why.status, why.said, round(took, 1), {}, str(one.log)))
            why = replace(why, status="SKIPPED", said=f"comes after '{missing[0]}' in one process")

    def _too_long(self, one: _Running) -> Outcome:
        if one.limit < self._limit(one.check):
            return Outcome("SKIPPED", f"cut off after {one.limit:.0f} s: the visit's {self._seconds:.0f} s were over")
        place = _place(one.log.read_text(errors="replace"))
        return Outcome("FAIL", f"did not end within {one.limit:g} s" + (f"; was in {place}" if place else ""))

    def _tell(self, row: Row) -> None:
        self.rows.append(row)
        if row.status == "PASS":
            self.visit = replace(self.visit, found={**self.visit.found, row.name: row.facts})
        self._told(row)


def _how_it_ended(one: _Running) -> Outcome | None:
    """Return what to say of a process that ended by itself, or None where it ended well."""
    code = one.process.exitcode
    if code == 0:
        return None
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    word = reason(one.log.read_text(errors="replace"))
    return Outcome("FAIL", f"its process {how}" + (f": {word}" if word else ""))


def _outcomes(path: Path) -> list[Outcome]:
    """Return the outcomes that a process wrote; a kill may have torn the last."""
    return [Outcome(**line) for line in read_json_lines(path)]


def _place(log: str) -> str | None:
    """Return where the main thread was, by faulthandler's stacks: this project's innermost frame."""
    stack = log.rpartition(_STACK)[2]  # the main thread's comes last
    frames = re.findall(r'File "([^"]+)", line (\d+) in (\S+)', stack)
    root = str(Path(__file__).resolve().parents[2])
    ours = [frame for frame in frames if frame[0].startswith(root) and "site-packages" not in frame[0]]
    if not frames:
        return None
    file, line, function = (ours or frames)[0]
    return f"{Path(file).name}:{line} {function}"


def _ask_for_stacks(one: _Running) -> None:
    """Let a process that takes too long write where it is, unless it has; it is ended with or without."""
    if _STACK in one.log.read_text(errors="replace"):
        return
    with suppress(ProcessLookupError):
        os.kill(one.process.pid, child.STACKS)
    deadline = time.monotonic() + ASKING
    while one.process.is_alive() and time.monotonic() < deadline and _STACK not in one.log.read_text(errors="replace"):
        one.process.join(0.1)
    one.process.join(0.1)  # the last of the lines


def _end(process: multiprocessing.Process) -> None:
    """Kill a process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
