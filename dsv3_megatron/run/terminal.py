"""What is printed cannot drive a terminal: names, logs and texts of others may hold sequences that move its cursor,
change its title, or answer in the user's place.

Every command prints through :class:`Printable`, which shows control characters as what they are (``\\x1b``). Only
:func:`rewrite` moves the cursor, for lines of progress.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from parallel.errors import spelled_out

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 but newline and tab, DEL, C1
_AGAIN = "\r\x1b[2K"  # to the begin of the line, which is emptied


def printable(text: str) -> str:
    """Return a text with its control characters, but newlines and tabs, as what they are."""
    return spelled_out(_CONTROLS, text)


class Printable:
    """A text stream that writes nothing that a terminal takes for a command, nor fails of what it cannot encode."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        """Write a text; return its length."""
        self._write(printable(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write texts one after another."""
        for line in lines:
            self.write(line)

    def rewrite(self, text: str, end: str) -> None:
        """Write a line in the place of the one that the cursor is in."""
        self._write(f"{_AGAIN}{printable(text)}{end}")

    def exactly(self, text: str) -> None:
        """Write a text as it is where no terminal is, for whoever reads it there."""
        self._write(printable(text) if self.stream.isatty() else text)

    def _write(self, text: str) -> None:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def printing_safely() -> Iterator[None]:
    """Have everything that is printed while the block lasts go through :class:`Printable`.

    It stays so after an exception, whose traceback Python prints when nothing else is left to do it.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _safe(sys.stdout), _safe(sys.stderr)
    yield
    sys.stdout, sys.stderr = before


def rewrite(stream: TextIO, text: str, end: str = "") -> None:
    """Write a line in the place of the one that the cursor is in. ``stream``: a terminal."""
    Printable(_plain(stream)).rewrite(text, end)
    stream.flush()


def print_exactly(text: str) -> None:
    """Print a text and a newline: as it is into a file or a pipe, harmless on a terminal."""
    Printable(_plain(sys.stdout)).exactly(text + "\n")


def _safe(stream: TextIO) -> TextIO:
    return cast(TextIO, Printable(_plain(stream)))


def _plain(stream: TextIO) -> TextIO:
    return stream.stream if isinstance(stream, Printable) else stream
