"""One process at a time, on any file system: flock where there is one, else a file that only one process can make.

Imports nothing slow: the last words of a rank are said under it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dsv3_megatron.run.handed import read_json_file
from dsv3_megatron.run.made import appended_file, new_file

BEAT_SECONDS = 10.0
STALE_SECONDS = 90.0
_OWNER_BYTES = 10_000
_LOOK_SECONDS = 0.05
# What a file system says that has no flock: Lustre without -o flock, NFS without its lock daemon, FUSE, object stores.
NO_FLOCK = frozenset((errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK))


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold ``path`` for as long as the block lasts; wait for whoever holds it.

    A process that is killed holds it no longer: at once where there is flock; else as soon as a process of its host
    looks, or after 90 s without a sign of life for those of other hosts.
    Raises: OSError: the file cannot be made.
    """
    with appended_file(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, also by a kill
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
        else:
            yield
            return
    held = path.with_name(path.name + ".held")
    while (owner := take(held)) is not None:
        if not _is_gone(owner, held):
            time.sleep(_LOOK_SECONDS)
        else:
            discard(held, owner)
    with beating(held):
        yield


def me() -> dict[str, object]:
    """Return what a file names its owner by. ``start``: how often SLURM had started the job again."""
    job, start = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "")
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "job": job,
        "start": int(start) if start.isdecimal() and len(start) < 10 else 0,
    }


def take(path: Path, **more: object) -> dict[str, object] | None:
    """Make ``path`` and return None; where another has made it return its owner, {} where it names none.

    ``more``: to write into it beside :func:`me`. Raises: OSError: the folder cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o666)
    except FileExistsError:
        return owner_of(path) or {}
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps({**me(), **more}))
    except OSError:  # a full disk: nobody's lock must not stay
        path.unlink(missing_ok=True)
        raise
    return None


def owner_of(path: Path) -> dict[str, object] | None:
    """Return who made ``path``; None where nobody is named: it is gone, torn, or says what is no owner."""
    try:
        content = read_json_file(path, _OWNER_BYTES)
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict):
        return None
    host, process, job, start = (content.get(key) for key in ("host", "process", "job", "start"))
    known = isinstance(host, str) and type(process) is int and 0 < process < 1 << 31 and isinstance(job, str | None)
    start = start if type(start) is int else 0  # an earlier version wrote none
    return {"host": host, "process": process, "job": job, "start": start} if known else None


def discard(path: Path, owner: dict[str, object]) -> None:
    """Remove the file of an owner that is gone. One that another process has made in its place meanwhile stays."""
    aside = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.gone")
    with suppress(OSError):  # another process was first
        os.rename(path, aside)
        if (owner_of(aside) or {}) != owner:
            with suppress(OSError):
                os.link(aside, path)
        aside.unlink()


@contextmanager
def beating(path: Path) -> Iterator[None]:
    """Touch ``path`` every ten seconds while the block lasts; then remove it, if this process still owns it."""
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, ended), daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()
        if owner_of(path) == me():
            path.unlink(missing_ok=True)


def is_alive(process: object) -> bool:
    """Return whether a process of this host is there."""
    try:
        os.kill(int(str(process)), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError):
        return True
    return True


def age_seconds(path: Path) -> float:
    """Return the seconds since ``path`` was touched, by the clock of its file system, which may not be ours."""
    probe = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        new_file(probe).close()
        return max(0.0, probe.stat().st_mtime - path.stat().st_mtime)
    except OSError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _is_gone(owner: dict[str, object], path: Path) -> bool:
    if owner.get("host") == socket.gethostname():
        return not is_alive(owner.get("process"))
    return age_seconds(path) > STALE_SECONDS  # of another host, or torn: its owner may be about to write it


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        with suppress(OSError):
            os.utime(path)
