"""Reading parts of very many files with few descriptors: opened when read, closed when others have been read since."""

from __future__ import annotations

import os
import resource
import threading
from collections import OrderedDict

from dsv3_megatron.run.files import retried
from dsv3_megatron.run.handed import regular_descriptor

MOST = 64  # descriptors; a quarter of what the process may have, where that is less


class _Descriptor:
    """An open file, closed when nobody has it any more: not in the middle of another thread's read."""

    def __init__(self, path: str):
        self.number = regular_descriptor(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class OpenFiles:
    """Files that are read at places, from any number of threads; those read last stay open."""

    def __init__(self, most: int | None = None):
        """``most`` files are open at once."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = most or (MOST if soft == resource.RLIM_INFINITY else max(1, min(MOST, soft // 4)))
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: str, size: int, place: int) -> bytes:
        """Return ``size`` bytes from ``place`` on, fewer where the file ends. Raises OSError: it cannot be read."""
        return retried(lambda: self._read(path, size, place))

    def close(self) -> None:
        """Close what is open; a later read opens it again."""
        with self._lock:
            self._open.clear()

    def _read(self, path: str, size: int, place: int) -> bytes:
        file = self._descriptor(path)
        found = b""
        try:
            while len(found) < size and (more := os.pread(file.number, size - len(found), place + len(found))):
                found = found + more if found else more
        except OSError:  # a file that was replaced on a network file system is stale: the next try opens it anew
            with self._lock:
                if self._open.get(path) is file:
                    del self._open[path]
            raise
        return found

    def _descriptor(self, path: str) -> _Descriptor:
        with self._lock:
            if (file := self._open.get(path)) is not None:
                self._open.move_to_end(path)
                return file
        file = _Descriptor(path)  # outside of the lock: a network may take its time
        with self._lock:
            file = self._open.setdefault(path, file)
            self._open.move_to_end(path)
            while len(self._open) > self._most:
                self._open.popitem(last=False)
        return file
