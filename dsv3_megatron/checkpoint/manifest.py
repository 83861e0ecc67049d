"""The manifest of a checkpoint: every file with its size and checksum, and where the run stood.

A checkpoint is a folder ``step_XXXXXXXX`` whose manifest matches its files. It is written beside its place and
renamed, so a folder of that name is complete; the manifest, which carries a checksum of itself, shows whether it still
is. Which checkpoint is the newest follows from the step in its name alone: clocks and pointers are not asked.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsv3_megatron.run.files import retried
from dsv3_megatron.run.handed import inside, open_regular, read_json_file, regular_size
from parallel.errors import CheckpointError

MANIFEST, RECIPE = "manifest.json", "recipe.yaml"
NEEDED = (".metadata", "common.pt", "metadata.json", RECIPE)  # what every checkpoint has beside its tensors
WEIGHTS, OPTIMIZER = "weights", "optimizer"  # what files hold, beside extra states by their names
FORMAT = 2  # 1: no checksums of pieces, so that files are read whole before they are trusted; optimizer states gathered
_HASHERS = 8
_NAME = re.compile(r"step_(\d{8,})")
_NO_SYNC_OF_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)  # CIFS, some FUSE and 9p
USE_OLDER = "use an older checkpoint"


FileFacts = dict[str, dict[str, Any]]  # name -> {"bytes": size, "xxh3": checksum, "holds": what}


class DamageError(CheckpointError):
    """A checkpoint is not what was written: another one may be."""


_Count = Annotated[int, Field(ge=0, lt=1 << 62)]
_Digest = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


class _Typed(BaseModel):
    """A part of a manifest; what it has beside these keys is left to who asks for it."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=True)


class _File(_Typed):
    bytes: _Count
    xxh3: _Digest
    holds: str = ""


class _Health(_Typed):
    model_config = ConfigDict(extra="forbid")

    losses: list[float] = []
    norms: list[float] = []
    skipped_in_row: _Count = 0
    rollbacks: _Count = 0


class _Progress(_Typed):
    model_config = ConfigDict(extra="forbid")

    step: _Count
    tokens: _Count
    samples: _Count
    skipped: _Count
    health: _Health = _Health()


class _Named(_Typed):
    sha256: str
    name: str


class _Text(_Named):
    order: int


class _Content(_Typed):
    """What a manifest says (:func:`manifest_text`)."""

    format: Annotated[int, Field(ge=1)]
    progress: _Progress
    files: dict[str, _File]
    extra: list[str]
    optimizer: bool
    updates: _Count | None = None
    freeze: list[str] = []
    tokenizer: _Named | None = None
    data: _Text | None = None


@contextmanager
def damage_of(path: Path) -> Iterator[None]:
    """Turn what the system says of a file, after it was asked again, into a damaged checkpoint."""
    try:
        yield
    except FileNotFoundError:
        raise DamageError(f"{path} is missing; {USE_OLDER}") from None
    except OSError as error:
        raise DamageError(f"{path} cannot be read ({error.strerror}); {USE_OLDER}") from None


def folder_name(step: int) -> str:
    """Return the folder name of the checkpoint after ``step`` steps."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """Return the step in a checkpoint's folder name."""
    return int(folder.name.removeprefix("step_"))


def checksum(path: Path) -> str:
    """Return the xxh3 checksum of a file, read in pieces; what cannot be read is read again."""
    return retried(lambda: _checksum(path))


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open_regular(path) as file:
        while piece := file.read(1 << 24):
            digest.update(piece)
    return digest.hexdigest()


def manifest_text(progress: dict[str, Any], files: FileFacts, facts: dict[str, Any]) -> str:
    """Return the manifest as text.

    Args:
        progress: where the run stood; what :func:`read_manifest` returns.
        files: taken while the files were written; small files that every reader needs hold nothing.
        facts: what else a reader may ask: layout, extra states.
    """
    content = {"format": FORMAT, "progress": progress, "files": dict(sorted(files.items())), **facts}
    return json.dumps({"xxh3": _digest(content), "content": content}, indent=1)


def _digest(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_content(folder: Path, *, whole: bool = True) -> dict[str, Any]:
    """Return all that a manifest says, checked against its own checksum but not against the files.

    ``whole``: it is a checkpoint's, not that of one rank's share alone.
    Raises: DamageError: it is missing or damaged, or does not say what a manifest does: every file, inside the folder.
    CheckpointError: a later version has written it.
    """
    path = folder / MANIFEST
    try:
        with damage_of(path):
            manifest = retried(lambda: read_json_file(inside(folder, MANIFEST)))
        content = manifest["content"]
        as_written = manifest["xxh3"] == _digest(content)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        said = "it is none" if isinstance(error, KeyError | TypeError | RecursionError) else error
        raise DamageError(f"{path} cannot be read ({said}); {USE_OLDER}") from None
    if not as_written:
        raise DamageError(f"{path} does not match its own checksum; {USE_OLDER}")
    if isinstance(content, dict) and type(number := content.get("format")) is int and number > FORMAT:
        raise CheckpointError(f"{path} has format {number}, this version reads up to {FORMAT}; use a newer one")
    try:
        _Content.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "its content"
        raise DamageError(f"{path}: {place}: {first['msg']}; {USE_OLDER}") from None
    if wrong := _wrong_names(content["files"], whole):
        raise DamageError(f"{path} {wrong}; {USE_OLDER}")
    return content


def _wrong_names(files: FileFacts, whole: bool) -> str | None:
    """Return what is wrong with the files that a manifest names: it names all that there must be, inside the folder."""
    if lacking := [name for name in (NEEDED if whole else (RECIPE,)) if name not in files]:
        return f"names no {lacking[0]}"
    if whole and not any(name.endswith(".distcp") for name in files):
        return "names no file of tensors"
    other = next((name for name in files if name in ("", ".", "..", MANIFEST) or "/" in name or "\0" in name), None)
    return None if other is None else f"names {other!r}, which can be no file of this folder"


def read_manifest(folder: Path, holding: Collection[str] | None = None) -> dict[str, Any]:
    """Return a checkpoint's progress after checking every file, or only those that hold what is to be read.

    Raises: DamageError: naming the first file that is missing, truncated or changed.
    """
    content = read_content(folder)
    for problem in problems(folder, content["files"], needed(content["files"], holding)):
        raise DamageError(problem)
    return content["progress"]


def needed(files: FileFacts, holding: Collection[str] | None) -> list[str]:
    """Return the names of the files that a reader of these states reads; of all where ``holding`` is None."""
    return [name for name, facts in files.items() if holding is None or facts.get("holds", "") in ("", *holding)]


def problems(folder: Path, files: FileFacts, names: Iterable[str] | None = None) -> Iterator[str]:
    """Yield what is wrong with the files (those of ``names`` only, where given), in a line each. Reads them whole,
    several at a time."""
    with ThreadPoolExecutor(_HASHERS) as pool:
        jobs = [pool.submit(_problem, folder / n, files[n], whole=True) for n in (files if names is None else names)]
        try:
            yield from (problem for job in jobs if (problem := job.result()))
        finally:
            pool.shutdown(cancel_futures=True)


def size_problems(folder: Path, files: FileFacts, names: Iterable[str]) -> Iterator[str]:
    """Yield what is wrong with the files of ``names`` as far as their sizes tell, in a line each."""
    yield from (problem for name in names if (problem := _problem(folder / name, files[name], whole=False)))


def _problem(path: Path, expected: dict[str, Any], *, whole: bool) -> str | None:
    """Return what is wrong with a file. One that is not as it was written is read twice before it is called damaged."""
    try:
        with damage_of(path):
            size = retried(lambda: regular_size(path.parent, path.name))
            if size != expected["bytes"]:
                return f"{path} has {size} bytes, its manifest says {expected['bytes']}; {USE_OLDER}"
            if whole and checksum(path) != expected["xxh3"] and (found := checksum(path)) != expected["xxh3"]:
                return f"{path} has xxh3 {found[:8]}.., its manifest says {expected['xxh3'][:8]}..; {USE_OLDER}"
    except DamageError as damage:
        return str(damage.args[0])
    except ValueError as error:
        return f"{path} is refused ({error}); {USE_OLDER}"
    return None


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, newest first, whether valid or not."""
    found = [p for p in folder.glob("step_*") if p.is_dir() and _NAME.fullmatch(p.name)]
    return sorted(found, key=step_of, reverse=True)


def newest_valid(folder: Path, holding: Collection[str] | None = None) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint whose files are as written, all or those that hold what is to be read, and what was
    wrong with newer ones."""
    wrong = []
    for path in checkpoints(folder):
        try:
            read_manifest(path, holding)
        except DamageError as error:
            wrong.append(str(error))
            continue
        return path, wrong
    return None, wrong


def sync_folder(folder: Path) -> None:
    """Make sure that the names in a folder are on the disk, where its file system has such a notion."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC_OF_FOLDERS:
            raise
    finally:
        os.close(descriptor)
