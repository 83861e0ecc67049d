"""JSON values in text -> rows: one a line, several on a line, one after another without a break, or in an array."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

_DECODER = json.JSONDecoder()
_BETWEEN = re.compile(r"[\s\0\ufeff]*")
_AGAIN = re.compile(r"[\n\r]|\}\s*,?\s*(?=\{)")  # where the next value may begin after one that cannot be read
_NEAR = 16  # characters: an escape or a literal that the end of a piece of text cuts


@dataclass(frozen=True)
class Unreadable:
    """A value that cannot be read."""

    why: str
    size: int = 0  # characters


class IncompleteError(Exception):
    """The text ends inside a value: with more text it may be one."""


def value_at(text: str, start: int, *, final: bool) -> tuple[object, int]:
    """Return the JSON value at ``start`` and where it ends; an :class:`Unreadable` one ends where to go on.

    ``final``: no text follows. Raises: IncompleteError: the value may go on after the end of the text.
    """
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        cut = error.msg.startswith("Unterminated string") or error.pos >= len(text) - _NEAR
        if cut and not final:
            raise IncompleteError from None
        why, at = f"is no JSON: {error.msg} at character {error.pos - start + 1}", error.pos
    except RecursionError:
        why, at = "is nested too deep to be read", start
    except ValueError as error:  # a number of thousands of digits
        why, at = f"is no JSON that can be read ({error})", start
    again = _AGAIN.search(text, at)
    if again is None and not final:
        raise IncompleteError
    end = len(text) if again is None else again.end()
    return Unreadable(why, end - start), end


def line_values(line: str) -> Iterator[object]:
    """Yield the values of one line."""
    try:
        yield json.loads(line)
        return
    except (ValueError, RecursionError):
        at = _BETWEEN.match(line).end()  # type: ignore[union-attr]  # it matches nothing, too
    while at < len(line):
        value, at = value_at(line, at, final=True)
        yield value
        at = _BETWEEN.match(line, at).end()  # type: ignore[union-attr]


class ValueStream:
    """Values in text that comes piece by piece, of any layout; elements of arrays of objects count as values."""

    def __init__(self) -> None:
        self._text = ""
        self._in_array = False
        self._tried = 0  # a value that was incomplete is tried again when the text is twice as long

    def feed(self, text: str, *, final: bool = False) -> Iterator[tuple[object, int]]:
        """Take more text and yield the values that are whole, each with its length in characters."""
        self._text += text
        if len(self._text) < self._tried and not final:
            return
        at = 0
        while True:
            at = self._skip(at)
            if at >= len(self._text):
                break
            start = at
            try:
                value, at = value_at(self._text, start, final=final)
            except IncompleteError:
                break
            yield value, at - start
        if final and self._in_array:
            yield Unreadable("is missing: the array of rows has no end"), 0
        self._text = self._text[at:]
        self._tried = 2 * len(self._text)

    def _skip(self, at: int) -> int:
        """Return where the next value begins: after blanks, commas, and what opens or closes the array of values."""
        while (at := _BETWEEN.match(self._text, at).end()) < len(self._text):  # type: ignore[union-attr]
            mark = self._text[at]
            if mark == "[" and not self._in_array:
                self._in_array = True
            elif mark == "]" and self._in_array:
                self._in_array = False
            elif not (mark == "," and self._in_array):
                break
            at += 1
        return at

    def rest(self) -> bytes:
        """Return what was fed and is no whole value."""
        return self._text.encode("utf-8", "surrogatepass")
