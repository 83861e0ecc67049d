"""Regular expressions of a tokenizer.json that are slow on some text, found by how they are written.

The library's engine (Oniguruma) tries one way after another to match, and nothing ends that but success. Where a part
that is repeated without end can itself match in several ways, the ways double with every character; where several such
parts follow each other, they are a power of the text's length. Published tokenizers repeat characters and classes,
two of them in a row at most, and groups only of a fixed length.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MOST_IN_A_ROW = 3  # parts that are repeated without end
MOST_TIMES = 1000  # that a part may be repeated, where an end is given: the engine writes it out so often
_CHARACTERS = 1 << 14  # of an expression
_GROUP = re.compile(r"\(\?(:|=|!|<=|<!|>|[imsu]*-?[imsu]*:)|\((?![?*])")
_FLAGS = re.compile(r"\(\?[imsu]*-?[imsu]*\)")
_ESCAPED = re.compile(
    r"\\(?:[pPxo]\{[^{}]*\}|x[0-9A-Fa-f]{1,2}|u[0-9A-Fa-f]{4}|[^gkKRXyYN0-9A-Za-z]|[dDwWsSbBAzZhHnrtfvaeGOpPL])",
    re.DOTALL,
)
_TIMES = re.compile(r"\{(\d{1,9})?(,)?(\d{1,9})?\}")


@dataclass
class _Part:
    """A group, or the whole: how many parts of it, in a row, are repeated without end, in the worst of its branches."""

    row: int = 0
    worst: int = 0
    is_fixed: bool = True  # it has one branch, of one length
    size: int = 0  # characters and classes, those repeated up to an end as often

    def close(self) -> int:
        """End a branch; return the worst of all."""
        self.worst, self.row = max(self.worst, self.row), 0
        return self.worst


def slow_part(pattern: str) -> str | None:
    """Return why an expression is refused; None where it is of the kinds that published tokenizers have."""
    if len(pattern) > _CHARACTERS:
        return f"it has {len(pattern):,} characters"
    open_parts, at = [_Part()], 0
    last: _Part | None = None  # what a repetition would repeat: a group, or an empty one for a character or class
    while at < len(pattern):
        here = open_parts[-1]
        if flags := _FLAGS.match(pattern, at):
            at, last = flags.end(), None
        elif group := _GROUP.match(pattern, at):
            open_parts.append(_Part())
            at, last = group.end(), None
        elif pattern[at] == ")" and len(open_parts) > 1:
            last = open_parts.pop()
            open_parts[-1].row += last.close()
            open_parts[-1].is_fixed &= last.is_fixed
            open_parts[-1].size += last.size
            at += 1
        elif pattern[at] == "|":
            here.close()
            here.is_fixed, last, at = False, None, at + 1
        elif pattern[at] == "\\":
            if not (escaped := _ESCAPED.match(pattern, at)):
                return f"it holds {pattern[at : at + 3]}"
            at, last = escaped.end(), _character(here)
        elif pattern[at] == "[":
            if not (end := _end_of_class(pattern, at)):
                return "it holds a class without an end"
            at, last = end, _character(here)
        elif (times := _times(pattern, at)) is not None:
            least, most, at = times
            if last is None:
                return "it repeats nothing, or what is repeated already"
            if reason := _repeated(here, last, least, most):
                return reason
            last = None
        elif pattern[at] in "()":
            return f"it holds {pattern[at : at + 3]}"
        else:
            at, last = at + 1, _character(here)
        if open_parts[-1].size > _CHARACTERS:
            return f"it is more than {_CHARACTERS:,} characters written out"
        if open_parts[-1].row > MOST_IN_A_ROW:
            return f"more than {MOST_IN_A_ROW} parts in a row are repeated without end"
    return "a group has no end" if len(open_parts) > 1 else None


def _character(here: _Part) -> _Part:
    here.size += 1
    return _Part(size=1)


def _repeated(here: _Part, part: _Part, least: int, most: int | None) -> str | None:
    """Count a repetition; return why it is refused."""
    if (most is not None and most > MOST_TIMES) or least > MOST_TIMES:
        return f"a part is repeated {max(least, most or 0):,} times"
    if most is None:
        if not part.is_fixed:
            return "a group that can match in several ways is repeated without end"
        here.row += 1
    else:
        if most > 1 and not part.is_fixed:
            return "a group that can match in several ways is repeated"
        here.row += part.worst * max(0, most - 1)
        here.size += part.size * max(0, most - 1)
    here.is_fixed &= least == most
    return None


def _times(pattern: str, at: int) -> tuple[int, int | None, int] | None:
    """Return (least, most, end) of a repetition that is written there; None where none is."""
    if pattern[at] in "*+?":
        least, most, end = {"*": (0, None), "+": (1, None), "?": (0, 1)}[pattern[at]] + (at + 1,)
        return least, most, end + (pattern[end : end + 1] in ("?", "+"))  # lazy, possessive
    found = _TIMES.match(pattern, at)
    if not found or not (found[1] or found[3]):
        return None  # Oniguruma takes other braces as they stand
    least = int(found[1] or 0)
    most = (int(found[3]) if found[3] else None) if found[2] else least
    return least, most, found.end() + (pattern[found.end() : found.end() + 1] == "?")


def _end_of_class(pattern: str, at: int) -> int:
    """Return where a class of characters ends, classes inside it too; 0 where it has no end."""
    depth = 0
    while at < len(pattern):
        if pattern[at] == "\\":
            at += 1
        elif pattern[at] == "[":
            depth += 1
            at += pattern[at + 1 : at + 2] == "^"
            at += pattern[at + 1 : at + 2] == "]"  # first it is a character
        elif pattern[at] == "]":
            depth -= 1
            if not depth:
                return at + 1
        at += 1
    return 0
