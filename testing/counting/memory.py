"""Host memory of this process, as Linux counts it."""

from __future__ import annotations

import ctypes
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def resident_bytes() -> int:
    """Return what is resident now."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """Return the most that was resident at once since :func:`forget_peak`, or since the process began."""
    return _status("VmHWM")


def forget_peak() -> None:
    """Let the peak begin anew from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def give_back_at_once() -> None:
    """Let malloc return pieces of 64 KiB and more as soon as they are freed, so that growth is of what is in use."""
    libc = ctypes.CDLL(None)
    assert libc.mallopt(_M_MMAP_THRESHOLD, 1 << 16) and libc.mallopt(_M_TRIM_THRESHOLD, 1 << 16)


def process_bytes() -> dict[str, int]:
    """Return all bytes that read and write calls of the process have moved so far, sockets among them."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {"read": int(lines["rchar"]), "written": int(lines["wchar"])}


def _status(key: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024
