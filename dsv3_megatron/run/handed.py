"""Files that somebody else may have made: regular ones, inside their folder, no larger than their reader expects.

A folder that was handed over may hold a pipe without end, a link to a system file, a name that leads out of it, or text
made to exhaust its reader. What is refused here is refused as OSError (it cannot be opened) or ValueError (it is not
what it should be), with a reason that goes into the one line of whoever reads.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import Counter
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any

NOT_REGULAR = errno.EINVAL  # of the OSError where a file is of another kind
TEXT_BYTES = 1 << 26  # of a small text file: a manifest, an index, a configuration, a recipe


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading, after links, if it is a regular one (:func:`regular_descriptor`)."""
    return os.fdopen(regular_descriptor(path, os.O_RDONLY), "rb")


def regular_descriptor(path: str | Path, flags: int) -> int:
    """Return a descriptor of a file, if it is a regular one. ``flags``: of ``open``, those that make it among them.

    Raises OSError: it cannot be opened, or is a folder, a device, a pipe or a socket: those have no end, or block.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_regular(path)
    return descriptor


def regular_size(folder: str | Path, name: str) -> int:
    """Return the size of a regular file of a folder.

    A link is followed as by :func:`inside`, and within the folder that it lies in, which a link may have put on another
    disk. Raises OSError: there is none, or it is of another kind (``NOT_REGULAR``). ValueError: a link leads elsewhere.
    """
    file = f"{folder}/{name}"
    found = os.lstat(file)
    if stat.S_ISLNK(found.st_mode):
        _check_link(Path(folder), name)
        found = os.stat(file)
    if not stat.S_ISREG(found.st_mode):
        raise _not_regular(file)
    return found.st_size


def _not_regular(path: str | Path) -> OSError:
    return OSError(NOT_REGULAR, "not a regular file", str(path))


def _check_link(folder: Path, name: str) -> None:
    try:
        inside(folder, name)
    except ValueError:
        if not real_path(folder / name).is_relative_to(real_path((folder / name).parent)):
            raise


def read_bytes(path: Path, limit: int = TEXT_BYTES) -> bytes:
    """Return a regular file's content.

    Raises OSError: it cannot be read. ValueError: it has more than ``limit`` bytes.
    """
    with open_regular(path) as file:
        size = min(limit, os.fstat(file.fileno()).st_size)
        content = file.read(size + 1)  # Python takes the memory for as much as is asked for
        if len(content) > size:  # it grows, or its file system says no size
            content += file.read(limit - size)
    if len(content) > limit:
        raise ValueError(f"has more than {limit:,} bytes")
    return content


def read_text(path: Path, limit: int = TEXT_BYTES) -> str:
    """Return a regular file's text (:func:`read_bytes`). Raises ValueError also where it is not UTF-8."""
    return read_bytes(path, limit).decode("utf-8")


def parse_json(text: str | bytes, *, unique: bool = False) -> Any:
    """Return what a JSON text holds.

    Args:
        unique: refuse an object that names a key twice: readers differ in which of the values they take.
    Raises ValueError: it is none, or is nested too deeply to be read.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_twins if unique else None)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def is_nested_deeper(content: object, levels: int) -> bool:
    """Return whether what a JSON text holds has more levels of objects and lists: each of them may be shown or
    compared by functions that call themselves."""
    level = [content]
    for _ in range(levels):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return any(isinstance(inner, dict | list) for inner in level)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"names {counts.most_common(1)[0][0]!r} twice")
    return found


def read_json_file(path: Path, limit: int = TEXT_BYTES) -> Any:
    """Return what a JSON file holds. Raises OSError, ValueError: as :func:`read_text` and :func:`parse_json` do."""
    return parse_json(read_text(path, limit))


def inside(folder: Path, name: str) -> Path:
    """Return the path of ``name``, which a file of ``folder`` gives, if it stays in the folder.

    A link may lead elsewhere in the folder, or, in a cache of Hugging Face's hub, from ``snapshots/REVISION`` to the
    ``blobs`` beside it. Whether there is such a file is not asked.
    Raises ValueError: the name is empty or absolute, goes up, or a link leads out of the folder.
    """
    if not is_inner(name):
        raise ValueError(f"{name!r} is not a name inside the folder")
    path = folder / name
    own, real = real_path(folder), real_path(path)
    if not real.is_relative_to(own) and not _is_blob(own, real):
        raise ValueError(f"{name!r} is a link out of the folder, to {real}; make it a hard link or a copy")
    return path


def is_inner(name: str) -> bool:
    """Return whether a name, as it is written, stays in the folder that it is looked for in."""
    path = PurePosixPath(name)
    return bool(path.parts) and "\0" not in name and not path.is_absolute() and ".." not in path.parts


def real_path(path: Path) -> Path:
    """Return where a path leads, after links; of one that leads to itself, which ``resolve`` raises for, what can be
    said: whoever opens it is refused."""
    return Path(os.path.realpath(path))


def _is_blob(own: Path, real: Path) -> bool:
    """Return whether ``own`` is in a snapshot of a cache, and ``real`` is one of that cache's blobs."""
    snapshots = (each for each in own.parents if each.name == "snapshots")
    return any(real.is_relative_to(each.parent / "blobs") for each in snapshots)
