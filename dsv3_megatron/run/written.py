"""Folders that a command fills: which files in them it has written itself, and may write again.

A mark in the folder names them with their sizes and times. While the command works it names what it is to write, so
that a command that was stopped knows its own files; whatever else is there is somebody's.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from dsv3_megatron.run.files import read_json, write_json


class WrittenFiles:
    """The files that one command writes into a folder, known by a mark of that name."""

    def __init__(self, folder: Path, mark: str):
        self._folder, self._mark = folder, folder / mark

    def other(self, names: Iterable[str]) -> str | None:
        """Return the first of the files ``names`` that is there and not as the command has left it; None if all are
        its own."""
        known = read_json(self._mark) if _is_regular(self._mark) else {}
        files, writing = known.get("files"), known.get("writing")
        own = files if isinstance(files, dict) else {}
        under_way = set(map(str, writing)) if isinstance(writing, list) else set()
        for name in names:
            path = self._folder / name
            if not os.path.lexists(path):
                continue
            if not _is_regular(path) or not (name in under_way or own.get(name) == _facts(path)):
                return name
        return None

    def begin(self, names: Iterable[str]) -> None:
        """Note that the command writes these files from here on. Raises OSError: the disk refused."""
        write_json(self._mark, {"files": {}, "writing": sorted(names)})

    def end(self, names: Iterable[str]) -> None:
        """Note the files as they are now, all written. Raises OSError: the disk refused."""
        there = [name for name in sorted(names) if _is_regular(self._folder / name)]
        write_json(self._mark, {"files": {name: _facts(self._folder / name) for name in there}, "writing": []})


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _facts(path: Path) -> list[int]:
    found = path.lstat()
    return [found.st_size, found.st_mtime_ns]
