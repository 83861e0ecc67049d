"""Files: how many a process opens, asks the status of, lists and renames, and how many bytes it reads and writes.

Names in the tally are ``opened/PLACE``, ``stat/PLACE``, ``listed/PLACE``, ``changed/PLACE`` (made, renamed or removed),
``read/PLACE``, ``written/PLACE`` and ``mapped/PLACE``, the last three in bytes of file contents. A file that is mapped
into memory counts with all that was mapped: which pages of it are read, no Python sees.

Not seen: what native code opens or reads by itself (loading shared libraries, ``torch.save`` to a path), and the
status that ``os.scandir``'s entries ask for. ``torch.load`` and ``torch.save`` over Python's files are seen.
"""

from __future__ import annotations

import _io
import builtins
import io
import os
import posix
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from testing.counting.tally import Tally

_SYSTEM = ("/proc/", "/sys/", "/dev/")
_CODE = (sys.prefix, sys.base_prefix, str(Path(tempfile.__file__).parent), str(Path(__file__).resolve().parents[2]))
_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
_LISTS = {"os.listdir", "os.scandir"}
_STATS = ((os, "stat"), (os, "lstat"), (os, "access"), (posix, "stat"), (posix, "lstat"))
_READS, _WRITES = ("read", "pread", "readv", "preadv"), ("write", "pwrite", "writev", "pwritev")
_COPIES = ("sendfile", "copy_file_range")

_counting: list[_Files] = []  # an audit hook stays until the process ends


class _Files:
    """Where a path belongs, and the tally it is counted in."""

    def __init__(self, tally: Tally, place_of: Callable[[str], str | None]):
        self.tally, self.place_of = tally, place_of

    def count(self, name: str, path: Any, number: int = 1) -> None:
        if isinstance(path, int):
            path = path_of(path)
        self.tally.add(f"{name}/{self.place(os.path.abspath(os.fsdecode(path)))}", number)

    def place(self, path: str) -> str:
        """Return where an absolute path belongs."""
        if named := self.place_of(path):
            return named
        if path.startswith(_SYSTEM):
            return "system"
        return "code" if path.startswith(_CODE) else "other"


@contextmanager
def counted_files(tally: Tally, place_of: Callable[[str], str | None] = lambda path: None) -> Iterator[None]:
    """Count inside.

    Args:
        place_of: name in the tally of an absolute path. Where it has none to give, a path is ``system`` (/proc, /sys,
            /dev), ``code`` (Python and this repository) or ``other``.
    """
    files = _Files(tally, place_of)
    if not _counting:
        sys.addaudithook(_audit)
    _counting[:] = [files]
    with ExitStack() as stack:
        for module in (builtins, io, _io):
            stack.enter_context(patch.object(module, "open", _counted_open(files)))
        for module, name in _STATS:
            stack.enter_context(patch.object(module, name, _counted_stat(files, getattr(module, name))))
        for names, what in ((_READS, "read"), (_WRITES, "written")):
            for name in names:
                stack.enter_context(patch.object(os, name, _counted_call(files, what, getattr(os, name))))
        for name in _COPIES:
            stack.enter_context(patch.object(os, name, _counted_copy(files, name, getattr(os, name))))
        try:
            yield
        finally:
            _counting[:] = [_NOBODY]


_NOBODY = _Files(Tally(""), lambda path: None)


def path_of(descriptor: int) -> str:
    """Return the path of an open file; of a socket or a pipe, one under /dev."""
    path = posix.readlink(f"/proc/self/fd/{descriptor}")
    return path if path.startswith("/") else f"/dev/{path}"


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    files = _counting[0]
    if files is _NOBODY:
        return
    if event == "open" and not isinstance(arguments[0], int):
        files.count("opened", arguments[0])
    elif event in _LISTS:
        files.count("listed", "." if arguments[0] is None else arguments[0])
    elif event in _CHANGES:
        files.count("changed", arguments[0])
    elif event == "mmap.__new__" and arguments[0] != -1:
        descriptor, length, _, offset = arguments
        files.count("mapped", descriptor, length or os.fstat(descriptor).st_size - offset)


def _counted_stat(files: _Files, real: Callable[..., Any]) -> Callable[..., Any]:
    def stat(path: Any, *arguments: Any, dir_fd: int | None = None, **others: Any) -> Any:
        whole = path if dir_fd is None else os.path.join(path_of(dir_fd), os.fsdecode(path))
        files.count("stat", whole)
        return real(path, *arguments, **others) if dir_fd is None else real(path, *arguments, dir_fd=dir_fd, **others)

    return stat


def _counted_call(files: _Files, what: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(descriptor: int, *arguments: Any) -> Any:
        result = real(descriptor, *arguments)
        files.count(what, descriptor, len(result) if isinstance(result, bytes) else result)
        return result

    return call


def _counted_copy(files: _Files, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def copy(first: int, second: int, *arguments: Any, **others: Any) -> int:
        number = real(first, second, *arguments, **others)
        source, target = (second, first) if name == "sendfile" else (first, second)
        files.count("read", source, number)
        files.count("written", target, number)
        return number

    return copy


def _counted_open(files: _Files) -> Callable[..., Any]:
    """Return ``open`` as the io module documents it, over a file that counts."""

    class CountedFile(io.FileIO):
        """A file without a buffer that counts what passes."""

        def __init__(self, file: Any, mode: str, closefd: bool, opener: Any):
            super().__init__(file, mode, closefd, opener)
            self._files_name = path_of(file) if isinstance(file, int) else os.path.abspath(os.fsdecode(file))

        def _passed(self, what: str, number: int | None) -> None:
            if number:
                files.count(what, self._files_name, number)

        def readinto(self, buffer: Any) -> Any:
            number = super().readinto(buffer)
            self._passed("read", number)
            return number

        def read(self, size: int | None = -1) -> Any:
            data = super().read(size)
            self._passed("read", len(data or b""))
            return data

        def readall(self) -> Any:
            data = super().readall()
            self._passed("read", len(data or b""))
            return data

        def write(self, data: Any) -> Any:
            number = super().write(data)
            self._passed("written", number)
            return number

    def counted(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        text = "b" not in mode
        raw = CountedFile(file, mode.replace("t", "").replace("b", ""), closefd, opener)
        if buffering == 0 and not text:
            return raw
        lines = text and (buffering == 1 or (buffering < 0 and raw.isatty()))
        size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
        kind: Any = io.BufferedReader
        if "+" in mode:
            kind = io.BufferedRandom
        elif "r" not in mode:
            kind = io.BufferedWriter
        buffered = kind(raw, size)
        if not text:
            return buffered
        whole = io.TextIOWrapper(buffered, encoding, errors, newline, lines)
        whole.mode = mode
        return whole

    return counted
