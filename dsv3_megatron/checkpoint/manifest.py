"""The manifest of a checkpoint: every file with its size and checksum, and where the run stood.

A checkpoint is a folder ``step_XXXXXXXX`` whose manifest matches its files. It is written beside its place and
renamed, so a folder of that name is complete; the manifest, which carries a checksum of itself, shows whether it still
is. Which checkpoint is the newest follows from the step in its name alone: clocks and pointers are not asked.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import xxhash

from parallel.errors import CheckpointError

MANIFEST, RECIPE, RANDOM = "manifest.json", "recipe.yaml", "random.pt"
_NAME = re.compile(r"step_(\d{8,})")
_USE_OLDER = "use an older checkpoint"


def folder_name(step: int) -> str:
    """Return the folder name of the checkpoint after ``step`` steps."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """Return the step in a checkpoint's folder name."""
    return int(folder.name.removeprefix("step_"))


def checksum(path: Path) -> str:
    """Return the xxh3 checksum of a file, read in pieces."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            digest.update(piece)
    return digest.hexdigest()


def manifest_text(progress: dict[str, Any], files: dict[str, dict[str, Any]], facts: dict[str, Any]) -> str:
    """Return the manifest as text.

    Args:
        progress: where the run stood; what :func:`read_manifest` returns.
        files: name -> ``{"bytes": size, "xxh3": checksum}``, taken while the files were written.
        facts: what else a reader may ask: layout, extra states.
    """
    content = {"format": 1, "progress": progress, "files": dict(sorted(files.items())), **facts}
    return json.dumps({"xxh3": _digest(content), "content": content}, indent=1)


def _digest(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_content(folder: Path) -> dict[str, Any]:
    """Return all that a manifest says, checked against its own checksum but not against the files.

    Raises: CheckpointError: it is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        content = manifest["content"]
        whole = manifest["xxh3"] == _digest(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {_USE_OLDER}") from None
    if not whole:
        raise CheckpointError(f"{path} does not match its own checksum; {_USE_OLDER}")
    return content


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's progress after checking every file.

    Raises: CheckpointError: naming the first file that is missing, truncated or changed.
    """
    content = read_content(folder)
    for problem in problems(folder, content["files"]):
        raise CheckpointError(problem)
    return content["progress"]


def problems(folder: Path, files: dict[str, dict[str, Any]], names: Iterable[str] | None = None) -> Iterator[str]:
    """Yield what is wrong with the files (those of ``names`` only, where given), in a line each."""
    for name in files if names is None else names:
        expected, path = files[name], folder / name
        try:
            size = path.stat().st_size
            found = checksum(path) if size == expected["bytes"] else None
        except FileNotFoundError:
            yield f"{path} is missing; {_USE_OLDER}"
            continue
        except OSError as error:
            yield f"{path} cannot be read ({error.strerror}); {_USE_OLDER}"
            continue
        if found is None:
            yield f"{path} has {size} bytes, its manifest says {expected['bytes']}; {_USE_OLDER}"
        elif found != expected["xxh3"]:
            yield f"{path} has xxh3 {found[:8]}.., its manifest says {expected['xxh3'][:8]}..; {_USE_OLDER}"


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, newest first, whether valid or not."""
    found = [p for p in folder.glob("step_*") if p.is_dir() and _NAME.fullmatch(p.name)]
    return sorted(found, key=step_of, reverse=True)


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


def sync_folder(folder: Path) -> None:
    """Make sure that the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
