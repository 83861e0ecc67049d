"""How much more of a host's memory files may take."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dsv3_megatron.run.handed import read_text

_SPARE = 1 << 30  # left to processes when the memory of a host, or of a job, is all that limits files
_CGROUPS = Path("/sys/fs/cgroup")
# Of a control group, versions 2 and 1: folder, its limit, its use, and the parts of that which the system takes back.
_VERSIONS = (
    ("", "memory.max", "memory.current", ("active_file", "inactive_file")),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
)


def free_bytes(folder: Path) -> int:
    """Return how many bytes more files in ``folder`` may have.

    That is the room of its file system. Where files lie in memory it is also what the host has left and what the job
    may use: their pages count as the job's, and the system kills a process of a job that has no memory left, where a
    file system that is full only refuses.
    """
    found = [shutil.disk_usage(folder).free]
    if _is_memory(folder):
        found += [_host_has(), *_job_may_use(_CGROUPS, Path("/proc/self/cgroup"))]
        return max(0, min(found) - _SPARE)
    return found[0]


def _is_memory(folder: Path) -> bool:
    """Return whether a folder's file system is held in memory, as far as Linux says so."""
    device = os.stat(folder).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = [line.split() for line in read_text(Path("/proc/self/mountinfo")).splitlines()]
    except FileNotFoundError:
        return False
    return any(words[2] == wanted and words[words.index("-") + 1] in ("tmpfs", "ramfs") for words in lines)


def _host_has() -> int:
    values = dict(line.split(":", 1) for line in read_text(Path("/proc/meminfo")).splitlines())
    return int(values["MemAvailable"].split()[0]) << 10


def _job_may_use(root: Path, memberships: Path) -> Iterator[int]:
    """Yield how many bytes more this process's control groups may use, of each that has a limit."""
    try:
        lines = read_text(memberships).splitlines()
    except OSError:  # no Linux with control groups
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        folder, limit, used, taken_back = _VERSIONS[controllers == "memory"]
        top = root / folder
        group = top / path.lstrip("/")
        for each in (group, *group.parents):
            if not each.is_relative_to(top):
                break
            try:
                most = read_text(each / limit).strip()
                stat = dict(line.split() for line in read_text(each / "memory.stat").splitlines())
                left = int(read_text(each / used)) - sum(int(stat.get(name, 0)) for name in taken_back)
            except OSError:  # the root has no limit; in a container, the groups outside of it are not seen
                continue
            if most != "max":
                yield int(most) - left
