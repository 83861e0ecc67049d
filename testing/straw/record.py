"""What the host waited for, or read from the device: where, in which part of the run, how often."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Whose code is named as the place: the innermost frame below one of these folders.
_CODE = ("dsv3_megatron/", "parallel/", "launcher/", "megatron/core/", "transformer_engine/")


class Record:
    """Counts events by (part of the run, kind, place)."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str, str]] = Counter()
        self.part = "start"
        self._lock = threading.Lock()

    def add(self, kind: str) -> None:
        """Count an event of ``kind`` at the place that the code is in."""
        with self._lock:
            self.counts[self.part, kind, place()] += 1

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Count under the name of a part of the run for as long as the block lasts, in all threads."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before


def place() -> str:
    """Return file and function of the innermost frame that is the project's, megatron-core's or TE's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/testing/" not in name and "/tests/" not in name:
            for folder in _CODE:
                if (start := name.rfind("/" + folder)) >= 0:
                    return f"{name[start + 1 :]} {frame.f_code.co_qualname}"
        frame = frame.f_back
    return "elsewhere"
