"""Small files that a kill or a full disk must not damage: whole replacement, and JSON lines with a torn end."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

WAITS = (0.5, 2.0)  # seconds before a read is tried again


def retried(read: Callable[[], T]) -> T:
    """Return what ``read`` returns; one that the system refuses is tried again, for a network may have lost it.

    Raises OSError: it was refused every time, or the file does not exist, which a second look does not change.
    """
    for seconds in WAITS:
        try:
            return read()
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(seconds)
    return read()


def write_atomically(path: Path, text: str) -> None:
    """Replace a file as a whole: a reader sees the old text or the new one, after a power cut too.

    Raises OSError, and then leaves the old file and nothing else.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
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
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file that holds one a line, oldest first; [] where there is none.

    A line that is no whole object is left out: a kill tears the line being written, and a writer that then appends
    to it spoils one more.
    """
    if not path.exists():
        return []
    found = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict):
            found.append(content)
    return found
