"""JSON values in text -> rows: one a line, several on a line, one after another without a break, or in an array.

A value that cannot be read costs itself: its end is found by its brackets, whatever stands in its strings, or by what
can only be the beginning of the next object.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

_DECODER = json.JSONDecoder()
_LONG_NUMBERS = json.JSONDecoder(parse_int=float)  # Python converts no more than 4,300 digits to an int
_BETWEEN = re.compile(r"[\s\0\ufeff,]*")
# What begins an object and nothing else: inside a string its quotes would be escaped.
_OBJECT = r'\{\s*(?:"(?:[^"\\\n\r]|\\.){0,256}"\s*:|\})'
_BEGINS = re.compile(_OBJECT)
_AGAIN = re.compile(  # where the next value begins after an object or array that is not closed
    rf'[\n\r]+(?![\s\]}}",]|\Z)|\}}[\s\0,]*(?={_OBJECT})'
)
_AFTER_WORDS = re.compile(rf"[\n\r]|(?={_OBJECT})")
# Strings and brackets. A string ends with its line at the latest, so that one without an end spoils no more than that.
_MARKS = re.compile(r'"(?:[^"\\\n\r]++|\\[\s\S])*+"?|[\[\]{}]')
_OPENED_BY = {"]": "[", "}": "{"}
_NEAR = 16  # characters: an escape or a literal that the end of a piece of text cuts
_LONGEST = 1 << 22  # characters in which the end of a value that cannot be read is looked for


@dataclass(frozen=True)
class Unreadable:
    """A value that cannot be read."""

    why: str
    size: int = 0  # bytes


class IncompleteError(Exception):
    """The text ends inside a value: with more text it may be one."""


def value_at(text: str, start: int, *, final: bool) -> tuple[object, int]:
    """Return the JSON value at ``start`` and where it ends; an :class:`Unreadable` one ends where the next may begin.

    ``final``: no text follows. Raises: IncompleteError: the value may go on after the end of the text.
    """
    try:
        value, end = _decoded(text, start)
    except json.JSONDecodeError as error:
        cut = error.msg.startswith("Unterminated string") or error.pos >= len(text) - _NEAR
        if cut and not final:
            raise IncompleteError from None
        why, at = f"is not JSON: {error.msg.removesuffix(' at')} at character {error.pos - start + 1}", error.pos
    except RecursionError:
        why, at = "is nested too deep to be read", start
    else:
        if isinstance(value, (dict, list)) or _stands_alone(text, end, final):
            return value, end
        why, at = "is not JSON: Expecting value at character 1", start  # a word that begins like a number
    end = _next(text, start, at, final)
    return Unreadable(why, _bytes(text[start:end])), end


def line_values(line: str) -> Iterator[object]:
    """Yield the values of one line."""
    try:
        yield json.loads(line)
        return
    except (ValueError, RecursionError):
        at = _after_blanks(line, 0)
    while at < len(line):
        value, at = value_at(line, at, final=True)
        yield value
        at = _after_blanks(line, at)


class ValueStream:
    """Values in text that comes piece by piece, of any layout; elements of arrays count as values."""

    def __init__(self) -> None:
        self._text = ""
        self._arrays = 0  # that are open
        self._tried = 0  # a value that was incomplete is tried again when the text is twice as long

    def feed(self, text: str, *, final: bool = False) -> Iterator[tuple[object, int]]:
        """Take more text and yield the values that are whole, each with its length in bytes."""
        self._text += text
        if len(self._text) < self._tried and not final:
            return
        at = 0
        value: object = None
        while True:
            at = self._skip(at)
            if at >= len(self._text):
                break
            start = at
            try:
                value, at = value_at(self._text, start, final=final)
            except IncompleteError:
                break
            yield value, _bytes(self._text[start:at])
        if final and self._arrays and not isinstance(value, Unreadable):  # else that is where it is cut
            yield Unreadable("is missing: the array of rows has no end"), 0
        self._text = self._text[at:]
        self._tried = 2 * len(self._text)

    def _skip(self, at: int) -> int:
        """Return where the next value begins: after blanks, commas, and what opens or closes arrays of values."""
        while (at := _after_blanks(self._text, at)) < len(self._text):
            mark = self._text[at]
            if mark == "[":
                self._arrays += 1
            elif mark == "]" and self._arrays:
                self._arrays -= 1
            else:
                break
            at += 1
        return at

    @property
    def waiting(self) -> int:
        """Characters that were fed and are no whole value yet."""
        return len(self._text)

    def rest(self) -> bytes:
        """Return what was fed and is no whole value."""
        return self._text.encode("utf-8", "surrogateescape")


def _decoded(text: str, start: int) -> tuple[object, int]:
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return _LONG_NUMBERS.raw_decode(text, start)


def _stands_alone(text: str, end: int, final: bool) -> bool:
    """Return whether a number, a string or a name is whole: ``2024`` of ``2024-01-01`` is not."""
    if end >= len(text) and not final:
        raise IncompleteError
    return end >= len(text) or text[end] in '[]{}"' or _after_blanks(text, end) > end


def _next(text: str, start: int, at: int, final: bool) -> int:
    """Return where to go on after the value at ``start``, which cannot be read from ``at`` on.

    Raises: IncompleteError: more text may tell.
    """
    waits = not final and len(text) - start < _LONGEST
    if text[start] in "{[":
        close = _closed(text, start)
        if close is None and waits:
            raise IncompleteError
        if close is not None and _goes_on(text, close):
            return close
        if at > start and _BEGINS.match(text, at):
            return at
        again = _AGAIN.search(text, at)
    else:
        again = _AFTER_WORDS.search(text, start + 1)
    if again is None and waits:
        raise IncompleteError
    return len(text) if again is None else again.end()


def _closed(text: str, start: int) -> int | None:
    """Return where the brackets that open at ``start`` are closed, None where they are not."""
    opened: list[str] = []
    for mark in _MARKS.finditer(text, start, start + _LONGEST):
        kind = mark[0][0]
        if kind in "{[":
            opened.append(kind)
        elif kind != '"':
            if opened.pop() != _OPENED_BY[kind]:
                return None
            if not opened:
                return mark.end()
    return None


def _goes_on(text: str, end: int) -> bool:
    """Return whether what follows may follow a value. Else the end lies inside a string: a quote is missing."""
    at = _after_blanks(text, end)
    return at >= len(text) or text[at] in "{[]" or "\n" in text[end:at] or "\r" in text[end:at]


def _after_blanks(text: str, at: int) -> int:
    return _BETWEEN.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogateescape"))
