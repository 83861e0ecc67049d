"""What a run writes beside its checkpoints. What the disk refuses is kept, told and tried again; it never ends the run.

A refusal is told once when it begins and once when it is over, with what was lost meanwhile. A line that the disk took
half of is taken back; where not even that is possible, the next line begins on a line of its own.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_megatron.run.files import cut_json_lines, write_atomically
from dsv3_megatron.run.made import appended_file
from dsv3_megatron.run.reasons import reason_of

PENDING_BYTES = 1 << 24  # kept of each file while the disk refuses it: 235,000 events, or days of steps of a large run
RETRY_SECONDS = 5.0  # a disk that refuses may take long to say so
Tell = Callable[[str, dict[str, Any], str], None]


@dataclass
class _Outage:
    reason: str
    lost: int = 0
    retry_at: float = 0.0


class Outages:
    """What cannot be written at the moment, and since when nobody was told of it: at its begin and its end somebody is.

    ``tell`` gets name, values and text of the events ``write_failed`` and ``write_recovered``.
    """

    def __init__(self, tell: Tell):
        self._tell = tell
        self._open: dict[str, _Outage] = {}

    def attempt(self, what: str, action: Callable[[], object], kinds: type[Exception] = OSError, lost: int = 0) -> bool:
        """Do ``action``; return whether it went through. ``lost``: entries that are lost where it did not."""
        try:
            action()
        except kinds as error:
            self.begin(what, reason_of(error), lost)
            return False
        self.end(what)
        return True

    def begin(self, what: str, reason: str, lost: int = 0) -> None:
        """``what`` was refused, and ``lost`` entries with it; told unless it is known."""
        is_known = what in self._open
        outage = self._open.setdefault(what, _Outage(reason))
        outage.lost += lost
        outage.retry_at = time.monotonic() + RETRY_SECONDS
        if not is_known:
            text = f"warning: {what} cannot be written ({reason}); training goes on, and it is tried again"
            self._tell("write_failed", {"file": what, "reason": reason}, text)

    def end(self, what: str, written: int = 1) -> None:
        """``what`` was written, ``written`` entries at once; told if it had been refused."""
        if (outage := self._open.pop(what, None)) is None:
            return
        values = {"file": what, "written": written, "lost": outage.lost}
        counts = f": {written} entries that had waited, {outage.lost} are lost" if written > 1 or outage.lost else ""
        self._tell("write_recovered", values, f"{what} is written again{counts}")

    def waits(self, what: str) -> bool:
        """Return whether ``what`` was refused so short ago that it is not tried again yet."""
        return what in self._open and time.monotonic() < self._open[what].retry_at

    def lose(self, what: str, count: int) -> None:
        """Count entries of a refused file that are not kept any longer."""
        self._open[what].lost += count

    def give_up(self, what: str, count: int) -> None:
        """The run ends, and ``count`` entries of ``what`` were never written."""
        outage = self._open[what]
        lost = outage.lost + count
        text = f"warning: {what} was not written to the end of the run ({outage.reason}): {lost} entries are lost"
        self._tell("write_lost", {"file": what, "reason": outage.reason, "lost": lost}, text)


class _Whole:
    """A file that is replaced as a whole; its newest text counts. Methods as those of :class:`_Appended`."""

    def __init__(self, path: Path, text: str):
        self.path, self.text = path, text
        self._written = False

    def write(self) -> int:
        write_atomically(self.path, self.text)
        self._written = True
        return 1

    def count(self) -> int:
        return int(not self._written)


class _Appended:
    """A file that grows at its end."""

    def __init__(self, path: Path):
        self.path = path
        self._entries: deque[bytes] = deque()
        self._bytes = 0
        self._keep: Callable[[dict[str, Any]], bool] | None = None

    def add(self, entry: bytes) -> int:
        """Take an entry; return how many older ones are given up for it."""
        self._entries.append(entry)
        self._bytes += len(entry)
        dropped = 0
        while self._bytes > PENDING_BYTES and len(self._entries) > 1:
            self._bytes -= len(self._entries.popleft())
            dropped += 1
        return dropped

    def cut(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the lines after the last that is to be kept, before anything else is written."""
        before = self._keep or (lambda row: True)
        self._keep = lambda row: before(row) and keep(row)
        self._entries = deque(entry for entry in self._entries if keep(json.loads(entry)))
        self._bytes = sum(map(len, self._entries))

    def write(self) -> int:
        """Write what is pending; return how many entries that were. Raises: OSError: the disk refused, and all of it is
        still pending."""
        if self._keep is not None:
            cut_json_lines(self.path, self._keep)
            self._keep = None
        if not self._entries:
            return 0
        size = None
        try:
            with appended_file(self.path) as file:
                size = file.seek(0, os.SEEK_END)
                torn = size and self.path.suffix == ".jsonl" and os.pread(file.fileno(), 1, size - 1) != b"\n"
                rest = memoryview(b"\n" * bool(torn) + b"".join(self._entries))
                while rest:
                    rest = rest[file.write(rest) :]
        except OSError:
            if size is not None:
                with suppress(OSError):  # what is torn now is on a line of its own then
                    os.truncate(self.path, size)
            raise
        count = len(self._entries)
        self._entries.clear()
        self._bytes = 0
        return count

    def count(self) -> int:
        """Return the entries that are pending."""
        return len(self._entries)


class ResilientFiles:
    """The files of a run beside its checkpoints. No method raises for what the disk refuses."""

    def __init__(self, tell: Tell):
        """``tell``: gets name, values and text of an event; it may append to one of these files itself."""
        self.outages = Outages(tell)
        self._files: dict[Path, _Whole | _Appended] = {}

    def append(self, path: Path, entry: bytes) -> None:
        """Append an entry: a line with its newline in a .jsonl, a record in another file."""
        file = self._appended(path)
        if dropped := file.add(entry):
            self.outages.lose(str(path), dropped)
        self._write(file)

    def cut(self, path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the lines after the last one that is to be kept; lines that are appended afterwards follow it."""
        file = self._appended(path)
        file.cut(keep)
        self._write(file)

    def replace(self, path: Path, text: str) -> None:
        """Replace a file as a whole."""
        file = self._files[path] = _Whole(path, text)
        self._write(file)

    def retry(self) -> None:
        """Write what had to wait, where it is time to try again."""
        for file in list(self._files.values()):
            if file.count():
                self._write(file)

    def flush(self) -> None:
        """Write what had to wait, now."""
        for file in list(self._files.values()):
            if file.count():
                self._try(file)

    def close(self) -> None:
        """Try a last time, and tell what is lost."""
        self.flush()
        for path, file in list(self._files.items()):
            if file.count():
                self.outages.give_up(str(path), file.count())
        self.flush()  # what was just told

    def _appended(self, path: Path) -> _Appended:
        file = self._files.setdefault(path, _Appended(path))
        assert isinstance(file, _Appended), f"{path} is replaced as a whole"
        return file

    def _write(self, file: _Whole | _Appended) -> None:
        if not self.outages.waits(str(file.path)):
            self._try(file)

    def _try(self, file: _Whole | _Appended) -> bool:
        what = str(file.path)
        try:
            written = file.write()
        except OSError as error:
            self.outages.begin(what, reason_of(error))
            return False
        self.outages.end(what, written)
        return True
