"""Small files that a kill or a full disk must not damage: whole replacement, and JSON lines with a torn end."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from dsv3_megatron.run.handed import NOT_REGULAR, open_regular, parse_json, read_json_file
from dsv3_megatron.run.made import appended_file, new_file

T = TypeVar("T")

WAITS = (0.5, 2.0)  # seconds before a read is tried again
LINE_BYTES = 1 << 24  # of a line that is read; the load of every expert of a large model takes some 2 ** 18
_LASTING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO, NOT_REGULAR)
_BEFORE_OBJECT = b" \t\r\n\xef\xbb\xbf"  # JSON's white space, and the mark that some editors put in front of a text
_BLOCK_BYTES = 1 << 16  # read at a time from the end of a file
_SKIPPED_BYTES = 1 << 20  # read at a time of a line that is too long


def retried(read: Callable[[], T]) -> T:
    """Return what ``read`` returns; one that the system refuses is tried again, for a network may have lost it.

    Raises OSError: it was refused every time, or there is no such file, or another kind of one, which a second look
    does not change.
    """
    for seconds in WAITS:
        try:
            return read()
        except OSError as error:
            if error.errno in _LASTING:
                raise
            time.sleep(seconds)
    return read()


def write_atomically(path: Path, text: str | bytes) -> None:
    """Replace a file as a whole: a reader sees the old text or the new one, after a power cut too.

    Raises OSError, and then leaves the old file and nothing else.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with new_file(temporary) as file:
            file.write(text.encode() if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())  # else the rename can reach the disk before the text
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: object) -> None:
    """Replace a JSON file as a whole (:func:`write_atomically`)."""
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file; {} where there is none, or it is torn or no object."""
    try:
        content = read_json_file(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file that holds one a line (:func:`iterate_json_lines`), as a list."""
    return list(iterate_json_lines(path))


def iterate_json_lines(path: Path, lost: Callable[[], object] = lambda: None) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file that holds one a line, oldest first; none where there is no file.

    One line is in memory at a time. A line that is no whole object, or longer than ``LINE_BYTES``, is left out.
    ``lost``: called for each such line, but for the last one without an end, which a kill tears.
    Raises: OSError: it cannot be read, or is no regular file.
    """
    if not path.exists():
        return
    with open_regular(path) as file:
        while line := file.readline(LINE_BYTES):
            if (content := _object(line)) is not None:
                yield content
                continue
            is_whole = line.endswith(b"\n")
            while not is_whole and (rest := file.readline(_SKIPPED_BYTES)):
                is_whole = rest.endswith(b"\n")
            if is_whole:
                lost()


def last_json_line(path: Path) -> dict[str, Any] | None:
    """Return the newest whole object of a file that holds one a line, None where there is none.

    Reads from the end, and no further than it must. Raises: OSError: as :func:`iterate_json_lines`.
    """
    if not path.exists():
        return None
    objects = (_object(line) for _, line in _lines_from_the_end(path))
    return next((content for content in objects if content is not None), None)


def cut_json_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the lines after the last one that is to be kept, in place.

    Reads from the end, and needs no room on the disk. Raises: OSError: the disk refused, or it is a link.
    """
    if not path.exists():
        return
    end = 0
    for start, line in _lines_from_the_end(path):
        content = _object(line)
        if content is not None and keep(content):
            end = start + len(line)
            break
    if end < path.stat().st_size:
        with appended_file(path) as file:  # which opens no link
            os.ftruncate(file.fileno(), end)


def _lines_from_the_end(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (place in the file, line with its newline), the last line first; none that is longer than LINE_BYTES."""
    with open_regular(path) as file:
        start, tail = file.seek(0, os.SEEK_END), b""
        is_long = False  # whether the line whose end was seen has no beginning yet, and is not kept
        while start:
            size = min(start, max(_BLOCK_BYTES, len(tail)))  # doubles: a long line is not put together block by block
            start -= size
            block = os.pread(file.fileno(), size, start)
            if is_long:
                before, newline, _ = block.rpartition(b"\n")
                if not newline:
                    continue
                is_long, block = False, before + newline
            tail = block + tail
            *whole, last = tail.split(b"\n")
            lines = [line + b"\n" for line in whole] + ([last] if last else [])
            place = start + len(tail)
            tail = lines.pop(0) if start else b""  # it may have begun before this block
            for line in reversed(lines):
                place -= len(line)
                yield place, line
            if len(tail) > LINE_BYTES:
                is_long, tail = True, b""


def _object(line: bytes) -> dict[str, Any] | None:
    if line.lstrip(_BEFORE_OBJECT)[:1] != b"{":  # a parser takes microseconds to say so: minutes for a damaged file
        return None
    try:
        content = parse_json(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None
