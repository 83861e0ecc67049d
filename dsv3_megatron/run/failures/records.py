"""What a start of a run leaves behind when it fails: a folder ``failures/START`` in the run directory.

``hosts.json`` says which ranks were on which host, written by rank 0 once all have met; ``HOST.jsonl`` holds a line for
each kind of failure of that host's ranks. A start that ends as it should removes its folder. So a folder that is there,
while nobody holds the run directory, is of a start that failed; a host that is in ``hosts.json`` and has written
nothing, though others have, was lost with all its processes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dsv3_megatron.run.files import read_json, read_json_lines, write_json
from dsv3_megatron.run.made import appended_file
from parallel.world import host_name

FOLDER, HOSTS = "failures", "hosts.json"
_SAID = 500  # characters of what a rank says
Kind = Literal["own", "follows", "silent"]


@dataclass(frozen=True)
class FailedRank:
    """A rank that has failed.

    Attributes:
        time: seconds since 1970 by its host's clock: when it spoke, or when it was missed.
        kind: ``own``: it met something itself. ``follows``: it lost another rank. ``silent``: it was gone without a
            word, as after SIGKILL, SIGSEGV or the kernel's out-of-memory killer; another rank of the host says so.
        of_host: whether what it met can be its host's fault: a device, a disk, a limit, its sudden death. False where
            it is the program's, which would fail in the same way elsewhere.
    """

    rank: int
    host: str
    time: float
    said: str
    kind: Kind
    of_host: bool


def start_name() -> str:
    """Return what all ranks of this start, and those of no other, call it."""
    variables = os.environ
    agent = variables.get("TORCHELASTIC_RUN_ID", "none")
    if "RANK" not in variables:
        begun = f"alone-{os.getpid()}"
    elif job := variables.get("SLURM_JOB_ID"):
        begun = f"job-{job}-{variables.get('SLURM_RESTART_COUNT', '0')}"
    elif variables.get("LOCAL_WORLD_SIZE") == variables.get("WORLD_SIZE"):
        begun = f"{agent}-{os.getppid()}"  # the agent's: names of runs may be the same in every start
    else:
        begun = f"{agent}-{variables.get('MASTER_PORT', '0')}"
    attempt = variables.get("TORCHELASTIC_RESTART_COUNT", "0")
    return re.sub(r"[^A-Za-z0-9._-]", "_", f"{begun}-{attempt}")


def start_folder(directory: str | Path) -> Path:
    """Return the folder of this start, which may not exist yet."""
    return Path(directory) / FOLDER / start_name()


def note_hosts(folder: Path, hosts: Sequence[str]) -> None:
    """Note the host of every rank, in their order; on rank 0. Raises OSError: it cannot be written."""
    ranks: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        ranks.setdefault(host, []).append(rank)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / HOSTS, ranks)


def note_failure(folder: Path, failed: FailedRank) -> None:
    """Add a rank that has failed, where the run directory exists: one that is missing on this host must not be made.

    Raises OSError: it cannot be written.
    """
    if not folder.parent.parent.is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    line = json.dumps({**asdict(failed), "said": failed.said[:_SAID]}) + "\n"
    with appended_file(folder / f"{re.sub(r'[^A-Za-z0-9._-]', '_', failed.host)}.jsonl") as file:
        file.write(line.encode())  # one write: lines of two ranks do not mix


def forget(folder: Path) -> None:
    """The start has ended as it should: remove what was noted."""
    shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class FailedStart:
    """What a start has left. ``hosts``: ranks of each host, {} where they had not met yet."""

    name: str
    hosts: Mapping[str, Sequence[int]]
    ranks: tuple[FailedRank, ...]


def failed_starts(directory: str | Path) -> list[tuple[Path, FailedStart]]:
    """Return the starts that have failed and were not asked for before, oldest first, with their folders.

    Nobody may train in the directory meanwhile. What cannot be read is left out.
    """
    folder = Path(directory) / FOLDER
    found = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return [(path, _read(path)) for path in sorted(found, key=lambda path: (path.stat().st_mtime, path.name))]


def _read(folder: Path) -> FailedStart:
    hosts = {
        host: ranks
        for host, ranks in read_json(folder / HOSTS).items()
        if isinstance(ranks, list) and all(isinstance(rank, int) for rank in ranks)
    }
    rows = (row for path in sorted(folder.glob("*.jsonl")) for row in read_json_lines(path))
    return FailedStart(folder.name, hosts, tuple(failed for row in rows if (failed := _failed(row)) is not None))


def _failed(row: Mapping[str, Any]) -> FailedRank | None:
    """Return what a line says; None where it is none of ours."""
    types: dict[str, Any] = {"rank": int, "host": str, "time": (int, float), "said": str, "kind": str, "of_host": bool}
    if not all(isinstance(row.get(name), kind) for name, kind in types.items()):
        return None
    if row["kind"] not in ("own", "follows", "silent"):
        return None
    return FailedRank(**{name: row[name] for name in types})


def failed_now(rank: int, said: str, kind: Kind, *, of_host: bool) -> FailedRank:
    """Return a rank of this host that has failed just now."""
    return FailedRank(rank, host_name(), time.time(), said, kind, of_host)
