"""The manifest of a checkpoint: every file with its size and checksum, and where the run stood.

A checkpoint is a folder ``step_XXXXXXXX`` whose manifest matches its files. It is written beside its place and
renamed, so a folder of that name is complete; the manifest shows whether it still is.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import xxhash

from parallel.errors import CheckpointError

MANIFEST = "manifest.json"
_NAME = re.compile(r"step_(\d{8})")


def folder_name(step: int) -> str:
    """Return the folder name of the checkpoint after ``step`` steps."""
    return f"step_{step:08d}"


def checksum(path: Path) -> str:
    """Return the xxh3 checksum of a file, read in pieces."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            digest.update(piece)
    return digest.hexdigest()


def write_manifest(folder: Path, progress: dict[str, Any]) -> None:
    """Write the manifest of all files in ``folder``, and make sure all of it is on the disk."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "xxh3": checksum(path)}
        _sync(path)
    path = folder / MANIFEST
    path.write_text(json.dumps({"progress": progress, "files": files}, indent=1))
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's progress after checking every file.

    Raises: CheckpointError: naming the first file that is missing, truncated or changed.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files, progress = manifest["files"], manifest["progress"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}/{MANIFEST} cannot be read ({error}); use an older checkpoint") from None
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; use an older checkpoint")
        if path.stat().st_size != expected["bytes"]:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes, its manifest says {expected['bytes']}; "
                "use an older checkpoint"
            )
        if (found := checksum(path)) != expected["xxh3"]:
            raise CheckpointError(
                f"{path} has xxh3 {found[:8]}.., its manifest says {expected['xxh3'][:8]}..; use an older checkpoint"
            )
    return progress


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, newest first, whether valid or not."""
    found = [p for p in folder.glob("step_*") if p.is_dir() and _NAME.fullmatch(p.name)]
    return sorted(found, reverse=True)


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint whose files are all as written, and what was wrong with newer ones."""
    wrong = []
    for path in checkpoints(folder):
        try:
            read_manifest(path)
        except CheckpointError as error:
            wrong.append(str(error))
            continue
        return path, wrong
    return None, wrong
